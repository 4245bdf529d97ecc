"""The neuron: parameters, moments of the membrane, surrogates, and the functions and module that hosts build on."""
