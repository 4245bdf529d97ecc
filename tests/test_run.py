"""``qif run`` as a user calls it: other people's programs, in processes of their own."""

import subprocess
import sys
import textwrap

import forked
import pytest

pytest.importorskip("spikingjelly")

SPIKINGJELLY = """
    import sys, torch
    from torch import nn
    from spikingjelly.activation_based import functional, layer, neuron, surrogate
    from spikingjelly.activation_based.neuron import LIFNode

    class Mine(LIFNode):
        def __init__(self, scale):
            super().__init__(3.0, True)
            self.scale = scale

    def build():
        net = nn.Sequential(
            layer.Linear(6, 8), layer.BatchNorm1d(8), LIFNode(detach_reset=True, surrogate_function=surrogate.ATan()),
            layer.Linear(8, 8), Mine(2.0), layer.Linear(8, 8), neuron.ParametricLIFNode(init_tau=4.0),
            layer.Linear(8, 3), neuron.LIFNode(2.0, True, 1.0, None),
        )
        return net

    if __name__ == "__main__":
        torch.manual_seed(0)
        net = build()
        kinds = (LIFNode, neuron.ParametricLIFNode)
        print("before", [type(m).__name__ for m in net if isinstance(m, kinds)])
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        for _ in range(2):
            net(torch.rand(4, 6)).sum().backward()
            functional.reset_net(net)
        optimizer.step()
        print("after", [type(m).__name__ for m in net if isinstance(m, kinds)], isinstance(net[4], Mine), net[4].scale)
        print("argv", sys.argv[1:])
"""

SNNTORCH = """
    import torch, snntorch as snn
    from snntorch import Leaky, utils
    from torch import nn

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden, self.out = Leaky(beta=0.9), snn.Leaky(0.9)  # no order tells which is the readout
            self.fc1, self.fc2 = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x):
            mem1, mem2 = self.hidden.init_leaky(), self.out.init_leaky()
            for _ in range(3):
                spk, mem1 = self.hidden(self.fc1(x), mem1)
                spk, mem2 = self.out(self.fc2(spk), mem2)
            return mem2

    net = Net()
    net(torch.rand(4, 6)).sum().backward()
    entered = len(snn.SpikingNeuron.instances)
    print(type(net.hidden).__name__, type(net.out).__name__, isinstance(net.out, Leaky), entered)
    alone = snn.Lapicque(R=5.0, C=1.0, time_step=0.5)
    print(alone(torch.ones(2))[1].shape, type(alone).__name__)
"""


QIF = "import sys; from qif_plugins.cli import main; sys.exit(main())"


def qif_run(folder, *words, program=None, check=True, python=forked.python):
    if program is not None:
        (folder / "train.py").write_text(textwrap.dedent(program))
    done = python(QIF, "run", *words, folder=folder)
    if check:
        assert done.returncode == 0, done.stderr
    return done


def new_python(code, *words, folder):
    """What :func:`forked.python` stands for."""
    return subprocess.run([sys.executable, "-c", code, *words], cwd=folder, capture_output=True, text=True, timeout=240)


def test_a_spikingjelly_script(tmp_path):
    words = ("train.py", "--lr", "0.1", "-h", "--", "-m", "x")
    done = qif_run(tmp_path, *words, program=SPIKINGJELLY, python=new_python)
    lines = done.stdout.splitlines()
    assert lines == [
        # The host's own neurons until the network is called: what a program sets on them means what it says.
        "before ['LIFNode', 'Mine', 'ParametricLIFNode', 'LIFNode']",
        "after ['QIFNode', 'QIFNode', 'LeakQIFNode', 'LIFNode'] True 2.0",
        "argv ['--lr', '0.1', '-h', '--', '-m', 'x']",
    ]
    assert "IFNode, LIFNode, ParametricLIFNode of spikingjelly.activation_based.neuron now build QIF" in done.stderr
    assert "the paper's parameters (fed by 1" in done.stderr
    assert "3 neurons are QIF (in the place of 2 LIFNode, 1 ParametricLIFNode); 1 stayed LIF" in done.stderr


@pytest.mark.host_independent
def test_a_snntorch_script(tmp_path):
    pytest.importorskip("snntorch")
    done = qif_run(tmp_path, "train.py", program=SNNTORCH, python=new_python)
    assert done.stdout.splitlines() == ["QIF Leaky True 2", "torch.Size([2]) LapicqueQIF"]
    assert "by data flow" in done.stderr
    assert "2 neurons are QIF (in the place of 1 Leaky, 1 Lapicque); 1 stayed LIF" in done.stderr


def test_options_and_modules(tmp_path):
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "job.py").write_text(textwrap.dedent(SPIKINGJELLY))
    done = qif_run(
        tmp_path, "--readout", "swap", "--dynamics", "lif", "--window", "keep", "-m", "package.job", "--readout", "x"
    )
    assert "after ['QIFNode', 'QIFNode', 'LeakQIFNode', 'QIFNode']" in done.stdout
    assert "argv ['--readout', 'x']" in done.stdout
    assert "the paper's parameters" not in done.stderr
    assert "window" not in done.stderr.replace("--window", "")
    done = qif_run(tmp_path, "-m", "package.missing", check=False)
    assert done.returncode == 2
    assert "package.missing" in done.stderr


@pytest.mark.host_independent
def test_a_script_without_lif_fails_loudly(tmp_path):
    done = qif_run(tmp_path, "train.py", program="print('done')", check=False)
    assert done.returncode == 3
    assert done.stdout == "done\n"
    assert "nothing was QIF: it imported none of" in done.stderr
    assert "torchrun --no-python qif run" in done.stderr
    done = qif_run(tmp_path, "missing.py", check=False)
    assert done.returncode == 2
    assert "no such file: missing.py" in done.stderr


def test_a_script_that_builds_none_fails_loudly(tmp_path):
    program = "from spikingjelly.activation_based import neuron\nneuron.KLIFNode()"
    done = qif_run(tmp_path, "train.py", program=program, check=False)
    assert done.returncode == 3
    assert "built no IFNode or LIFNode or ParametricLIFNode" in done.stderr


@pytest.mark.host_independent
@pytest.mark.parametrize(
    ("ending", "status", "last"),
    [
        ("sys.exit(7)", 7, None),
        ("sys.exit('wrong')", 1, "wrong"),
        ("raise KeyError('lr')", 1, "KeyError: 'lr'"),
        ("open('absent')", 1, "FileNotFoundError: [Errno 2] No such file or directory: 'absent'"),
        ("def f(:", 1, "SyntaxError: invalid syntax"),
    ],
)
def test_status_and_traceback_are_those_of_the_program(tmp_path, ending, status, last):
    done = qif_run(tmp_path, "train.py", program=f"import sys\n{ending}", check=False)
    assert done.returncode == status
    theirs = [line for line in done.stderr.splitlines() if not line.startswith("qif run: ")]
    if last is not None:
        plain = subprocess.run([sys.executable, "train.py"], cwd=tmp_path, capture_output=True, text=True)
        assert theirs == plain.stderr.splitlines()
        assert theirs[-1] == last


def test_imports_in_any_order_and_pickles(tmp_path):
    program = """
        import copy, pickle
        import torch
        from spikingjelly.activation_based import layer
        from spikingjelly.activation_based import functional, neuron
        net = torch.nn.Sequential(layer.Linear(2, 2), neuron.IFNode(), layer.Linear(2, 2), neuron.LIFNode())
        net(torch.rand(1, 2))
        functional.reset_net(net)
        twin = pickle.loads(pickle.dumps(copy.deepcopy(net)))
        print([type(m).__name__ for m in twin], isinstance(twin[1], neuron.IFNode), isinstance(twin[1], neuron.LIFNode))
        torch.save(net, "net.pt")
    """
    done = qif_run(tmp_path, "train.py", program=program)
    assert done.stdout == "['Linear', 'QIFNode', 'Linear', 'LIFNode'] True False\n"
    load = "import torch; print([type(m).__name__ for m in torch.load('net.pt', weights_only=False)])"
    done = new_python(load, folder=tmp_path)
    assert done.stdout == "['Linear', 'QIFNode', 'Linear', 'LIFNode']\n"


def test_a_network_of_one_neuron_is_swapped(tmp_path):
    program = """
        import torch
        from spikingjelly.activation_based import layer, neuron
        net = torch.nn.Sequential(layer.Flatten(), layer.Linear(4, 2), neuron.LIFNode())
        net(torch.rand(3, 2, 2))
        print(type(net[2]).__name__)
    """
    done = qif_run(tmp_path, "train.py", program=program)
    assert done.stdout == "QIFNode\n"
    assert "although it may read out" in done.stderr


def test_the_first_call_may_come_through_a_wrapper(tmp_path):
    program = """
        import torch
        from spikingjelly.activation_based import layer, neuron
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        net = torch.nn.Sequential(layer.Linear(4, 4), neuron.ParametricLIFNode(), layer.Linear(4, 2), neuron.LIFNode())
        net = torch.nn.parallel.DistributedDataParallel(net)
        net(torch.rand(3, 4)).sum().backward()
        print([type(m).__name__ for m in net.module])
    """
    done = qif_run(tmp_path, "train.py", program=program)
    assert done.stdout == "['Linear', 'LeakQIFNode', 'Linear', 'LIFNode']\n"


COPIES = """
    import copy, torch
    from torch import nn
    from spikingjelly.activation_based import layer, neuron

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.features = nn.Sequential(layer.Linear(4, 4), layer.BatchNorm1d(4), neuron.LIFNode())
            self.head, self.out = layer.Linear(4, 2), neuron.LIFNode()

        def forward(self, x):
            return self.out(self.head(self.features(x)))

    class Unregistered(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = layer.Linear(4, 4)
            self.nodes = [neuron.LIFNode()]

        def forward(self, x):
            return self.nodes[0](self.fc(x))

    def kinds(net):
        return [type(m).__name__ for m in (net.features[2], net.out)]

    net = Net()
    average, twin = torch.optim.swa_utils.AveragedModel(net), copy.deepcopy(net)
    net.forward(torch.rand(3, 4))  # the first module called is a part of the network
    twin(torch.rand(3, 4))
    average(torch.rand(3, 4))
    print(kinds(net), kinds(twin), kinds(average.module))
    Unregistered()(torch.rand(3, 4))
    neuron.IFNode()(torch.rand(3))

    def annotated(x: int):
        pass

    print(annotated.__annotations__)
    print(torch.compile(net, backend="eager")(torch.rand(3, 4)).shape)
"""


def test_copies_parts_and_neurons_outside_networks(tmp_path):
    done = qif_run(tmp_path, "train.py", program=COPIES)
    both = "['QIFNode', 'LIFNode']"
    assert done.stdout.splitlines() == [f"{both} {both} {both}", "{'x': <class 'int'>}", "torch.Size([3, 2])"]
    assert done.stderr.count("Net is called for the first time") == 2
    assert "Sequential is called" not in done.stderr
    assert "Unregistered is called for the first time" in done.stderr
    assert "5 neurons are QIF (in the place of 4 LIFNode, 1 IFNode); 3 stayed LIF" in done.stderr
    assert "1 of them was in no network that was called (1 IFNode)" in done.stderr


SILENT = """
    import torch
    from spikingjelly.activation_based import functional, layer, neuron
    net = torch.nn.Sequential(
        layer.Linear(4, 8), neuron.LIFNode(), layer.Linear(8, 8), neuron.LIFNode(), layer.Linear(8, 2),
        neuron.LIFNode(),
    )
    functional.set_step_mode(net, "m")
    with torch.no_grad():
        net[0].weight.mul_(4), net[2].weight.mul_(0.01), net[2].bias.zero_(), net[4].bias.zero_()
    for _ in range(60):
        net(torch.randn(4, 16, 4))
        functional.reset_net(net)
    print(len(net[3]._forward_hooks))
    del net
"""


def test_layers_that_hardly_spike_are_told(tmp_path):
    done = qif_run(tmp_path, "train.py", program=SILENT)
    assert done.stdout == "0\n"
    told = [line.removeprefix("qif run: ") for line in done.stderr.splitlines()][-3:]
    assert told[0] == "3: hardly ever spiked (0 per neuron-step in the end, 0 at first)"
    assert told[1].startswith("5: reads out, and hardly ever spiked (0 per")
    assert "'qif run --window keep' leaves each neuron its own surrogate" in told[2]
    assert "1: hardly" not in done.stderr


def test_every_word_after_the_program_is_the_programs(tmp_path):
    program = "import sys\nfrom spikingjelly.activation_based import neuron\nimport torch\n"
    program += "neuron.LIFNode()(torch.rand(2))\nprint(sys.argv[1:])"
    done = qif_run(tmp_path, "train.py", "--", "a", "--", program=program)
    assert done.stdout == "['--', 'a', '--']\n"
    assert "1 neuron is QIF" in done.stderr
    done = qif_run(tmp_path, "--norm", "keep", "-m", "train", "--", "-m")
    assert done.stdout == "['--', '-m']\n"


@pytest.mark.parametrize("ending", ["", "raise SystemExit"])
def test_neurons_that_never_ran_here(tmp_path, ending):
    program = f"from spikingjelly.activation_based import neuron\nneuron.LIFNode()\n{ending}"
    done = qif_run(tmp_path, "train.py", program=program, check=False)
    assert done.returncode == (0 if ending else 3)
    assert ("nothing ran as QIF: neurons were built, but none ran" in done.stderr) is not bool(ending)
    assert ("no QIF neuron ran before the program ended itself" in done.stderr) is bool(ending)
