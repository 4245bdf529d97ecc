"""Comparison of LIF and QIF in one small network, trained on images in every installed host.

:mod:`.hosts` builds the network from a host's own layers with the neuron as its one argument, :mod:`.training` trains
it, :mod:`.report` turns the results into a table, a JSON file and a figure.
"""
