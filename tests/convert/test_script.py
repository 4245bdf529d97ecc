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
    assert "its leak matched (fed by 1" in done.stderr
    assert "measured on the first input" in done.stderr
    assert "qif run --dynamics monotone keeps LIF's gain" in done.stderr
    assert "--readout swap replaces it" in done.stderr
    assert not [word for word in ("swap(", "example_input", "input_gain=", "window=") if word in done.stderr]
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


SET_AFTER = """
    import copy, math, torch
    from torch import nn
    from spikingjelly.activation_based import functional, layer, neuron, surrogate
    import qif_plugins
    from qif_plugins.adapters.spikingjelly import QIFNode

    def build():
        torch.manual_seed(0)
        net = nn.Sequential(
            layer.Linear(4, 8), neuron.LIFNode(), layer.Linear(8, 8), neuron.ParametricLIFNode(), layer.Linear(8, 8),
            neuron.LIFNode(), layer.Linear(8, 2), neuron.LIFNode(),
        )
        assert isinstance(net[1], neuron.LIFNode) and not isinstance(net[1], neuron.ParametricLIFNode)
        functional.set_step_mode(net, "m")
        net[1].detach_reset, net[1].v_threshold, net[1].v_reset, net[1].tau = True, 0.25, -0.1, 4.0
        net[1].store_v_seq, net[1].v, net[1].note = True, torch.full((3, 8), 0.2), "mine"
        net[1].surrogate_function = surrogate.ATan(alpha=3.0)
        net[3].w = nn.Parameter(torch.tensor(0.7), requires_grad=False)
        net[3].v = 0.1
        net[5].v_threshold, net[7].v_threshold = math.inf, nn.Parameter(torch.tensor(0.5))
        net[1].register_forward_hook(lambda *call: hooked.append(call[2].shape))
        net.load_state_dict({key: value * 1.5 for key, value in net.state_dict().items()})
        return net.double().eval()

    hooked = []
    x = torch.rand(16, 3, 4).double()
    nets = [build(), copy.deepcopy(build()), torch.load(SAVED, weights_only=False)]
    reference = build()
    state = reference[1].v, reference[3].v
    qif_plugins.swap(reference, example_input=x, window="keep")
    reference[1].v, reference[3].v = state
    expected = reference(x)
    for net in nets:
        hooked.clear()
        assert torch.equal(net(x), expected)
        assert hooked == [(16, 3, 8)]
        assert [type(net[i]).__name__ for i in (1, 3, 5, 7)] == ["QIFNode", "LeakQIFNode", "LIFNode", "LIFNode"]
        node = net[1]
        assert (node.step_mode, node.detach_reset, node.v_threshold, node.v_reset) == ("m", True, 0.25, -0.1)
        matched = dict(v_rest=-0.1, input_gain=0.25, v_reset=-0.1)
        assert node.params == qif_plugins.QIFParameters.matching_lif(0.75, 0.25, **matched)
        assert (node.v.shape, node.v_seq.shape, node.note) == ((3, 8), (16, 3, 8), "mine")
        assert not net[3].w.requires_grad and net[3].w.dtype == torch.float64
        functional.reset_net(net), functional.set_step_mode(net, "s")
        net(x[0])
        assert net[1].step_mode == "s" and net[1].v.shape == (3, 8)
    print("RESULT")
"""


def test_what_the_program_sets_on_its_neurons_stays(tmp_path):
    saved = """
        import torch
        from spikingjelly.activation_based import functional, layer, neuron, surrogate
    """
    build = SET_AFTER[SET_AFTER.index("    def build") : SET_AFTER.index("    hooked = []")]
    build = build.replace("net[1].register_forward_hook", "0 and net[1].register_forward_hook")
    saved = "import math, torch\nfrom torch import nn\n" + textwrap.dedent(saved) + textwrap.dedent(build)
    done = new_python(saved + "torch.save(build(), 'net.pt')", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    program = SET_AFTER.replace("SAVED", "'net.pt'")
    program = program.replace("assert hooked == ", "assert net is nets[2] or hooked == ")
    done = qif_run(tmp_path, "--window", "keep", "train.py", program=program)
    assert done.stdout == "RESULT\n"
    assert done.stderr.count("its threshold is not finite") == 4
    assert "by registration order" not in done.stderr
    # With the reference, which the program swapped itself, and which has two readouts and one that never fires.
    assert "8 neurons are QIF (in the place of 4 LIFNode, 4 ParametricLIFNode); 8 stayed LIF (8 LIFNode)" in done.stderr


@pytest.mark.host_independent
def test_what_the_program_sets_on_its_snntorch_neurons_stays(tmp_path):
    pytest.importorskip("snntorch")
    program = """
        import copy, torch
        import snntorch as snn
        from torch import nn
        import qif_plugins

        def build():
            torch.manual_seed(0)
            net = nn.Sequential(
                nn.Linear(4, 8), snn.Leaky(0.9, init_hidden=True), nn.Linear(8, 8), snn.Leaky(0.8, learn_beta=True),
            )
            net[1].inhibition, net[1].threshold, net[1].beta = True, torch.tensor(0.5), nn.Parameter(torch.tensor(0.7))
            net[1].mem, net[1].reset_mechanism = torch.full((3, 8), 0.2), "zero"
            net[3].init_hidden, net[3].output = True, False
            net[3].beta.requires_grad_(False)
            return net

        x = torch.rand(3, 4)
        net, reference = build(), build()
        mem = reference[1].mem
        qif_plugins.swap(reference, example_input=x)
        reference[1].mem = mem
        for _ in range(3):
            assert torch.equal(net(x), reference(x))
        assert [type(net[i]).__name__ for i in (1, 3)] == ["QIF", "Leaky"]
        assert net[1].inhibition and net[1].beta.requires_grad and net[1].beta is dict(net.named_parameters())["1.beta"]
        assert isinstance(net[1], snn.Leaky) and len(snn.SpikingNeuron.instances) == 4
        alone = snn.Leaky(0.9, threshold=0.25, init_hidden=True)
        alone.mem = torch.tensor([0.1, 0.2])
        other = qif_plugins.adapters.snntorch.QIF(
            0.9, threshold=0.25, init_hidden=True, reset_mechanism="subtract", dynamics="monotone"
        )
        other.mem = torch.tensor([0.1, 0.2])
        for value in torch.rand(5, 2):
            assert torch.equal(alone(value), other(value)) and torch.equal(alone.mem, other.mem)
        print("RESULT", type(alone).__name__)
    """
    done = qif_run(
        tmp_path,
        "train.py",
        program=program.replace("import qif_plugins\n", "import qif_plugins.adapters.snntorch\n", 1),
    )
    assert done.stdout == "RESULT QIF\n"


OWN_CODE = """
    import torch
    from torch import nn
    from spikingjelly.activation_based import functional, layer, neuron, surrogate

    class Whole(neuron.LIFNode):
        def forward(self, x):
            v, out = torch.zeros_like(x[0]), []
            for step in x:
                v = 0.9 * v + 0.3 * step
                s = self.surrogate_function(v - 1.0)
                v = v * (1 - s)
                out.append(s)
            return torch.stack(out)

    class Deeper(Whole):
        def __init__(self, scale):
            super().__init__(surrogate_function=surrogate.ATan())
            self.scale = scale

    class Around(neuron.ParametricLIFNode):
        def forward(self, x):
            return 2 * super().forward(x + 0.5)

    class Mixin:
        def forward(self, x):
            return super().forward(x).flip(0)

    class Mixed(Mixin, neuron.IFNode):
        pass

    class Plain(neuron.LIFNode):
        def __init__(self):
            super().__init__(tau=3.0)

    torch.manual_seed(0)
    own = [Whole(), Deeper(1.0), Around(), Mixed()]
    for node in own:
        node.step_mode = "m"
        x = (3 * torch.rand(5, 4)).requires_grad_()
        out = node(x)
        out.sum().backward()
        print(type(node).__name__, type(node.surrogate_function).__name__, out.tolist(), x.grad.tolist())
    net = nn.Sequential(layer.Linear(4, 4), own[2], layer.Linear(4, 4), Plain(), layer.Linear(4, 2))
    functional.reset_net(net)
    functional.set_step_mode(net, "m")
    net(torch.rand(5, 2, 4))
"""


def test_subclasses_with_code_of_their_own_are_left_whole_and_named(tmp_path):
    done = qif_run(tmp_path, "train.py", program=OWN_CODE)
    plain = new_python(textwrap.dedent(OWN_CODE), folder=tmp_path)
    assert done.stdout == plain.stdout
    for name in ("Whole", "Deeper", "Around", "Mixed"):
        assert f"a {name} stays LIF: has code of its own (forward)" in done.stderr
    assert "1 neuron is QIF (in the place of 1 LIFNode); 4 stayed LIF" in done.stderr


@pytest.mark.host_independent
def test_snntorch_subclasses_with_code_of_their_own_are_left_whole_and_named(tmp_path):
    pytest.importorskip("snntorch")
    program = """
        import torch, snntorch as snn
        from torch import nn

        class Own(snn.Leaky):
            def forward(self, x, mem=None):
                spk, mem = super().forward(2 * x, mem)
                return spk, mem

        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 8), Own(beta=0.9))
        x = torch.rand(3, 4, requires_grad=True)
        spk, mem = net(x)
        (spk + mem).sum().backward()
        print(spk.tolist(), mem.tolist(), x.grad.tolist(), type(net[1].spike_grad).__name__)
    """
    done = qif_run(tmp_path, "train.py", program=program, check=False)
    assert done.stdout == new_python(textwrap.dedent(program), folder=tmp_path).stdout
    assert done.returncode == 3
    assert "has code of its own (forward)" in done.stderr
    assert "0 neurons are QIF; 1 stayed LIF (1 Leaky)" in done.stderr
    assert "nothing ran as QIF: its neurons stayed LIF, for the reasons given above" in done.stderr


FIRST_CALL = """
    import random
    import numpy as np, torch
    from torch import nn
    from spikingjelly.activation_based import functional, layer, neuron

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.out, self.hidden = neuron.LIFNode(), neuron.LIFNode()
            self.head, self.fc = nn.Linear(8, 2), nn.Linear(4, 8)
            self.calls = 0

        def forward(self, x, *, scale, noise=None):
            self.calls += 1
            print("runs", scale)
            x += 1
            coins = torch.rand_like(x), np.random.rand(), random.random()
            return self.out(self.head(self.hidden(self.fc(x * scale + coins[0]))))

    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    net, seen = Head(), []
    net.fc.register_forward_hook(lambda *call: seen.append(1))
    x = torch.zeros(3, 4)
    with torch.inference_mode():
        net(x, scale=2.0)
    print(net.calls, len(seen), x.mean().item(), torch.rand(1).item(), np.random.rand(), random.random())
    print("kinds", type(net.hidden).__name__, type(net.out).__name__)
    functional.reset_net(net)
    net(torch.rand(3, 4), scale=1.0).sum().backward()
"""


def test_the_first_calls_arguments_tell_the_readout_and_nothing_else_notices(tmp_path):
    done = qif_run(tmp_path, "train.py", program=FIRST_CALL)
    plain = new_python(textwrap.dedent(FIRST_CALL), folder=tmp_path)
    assert plain.returncode == 0, plain.stderr
    assert done.stdout == plain.stdout.replace("kinds LIFNode", "kinds QIFNode")
    assert "reads out, by data flow" in done.stderr


NOTHING_TO_SWAP = """
    import random, sys, warnings
    import numpy as np, torch
    from torch import nn
    from spikingjelly.activation_based import functional, layer, neuron

    class Own(neuron.LIFNode):
        def neuronal_charge(self, x):
            self.v = 0.9 * self.v + x

    own, numpys, pythons = torch.Generator().manual_seed(1), np.random.default_rng(2), random.Random(3)

    class Net(nn.Module):
        calls = 0

        def __init__(self, hidden, out):
            super().__init__()
            self.fc, self.hidden, self.drop = layer.Linear(4, 8), hidden, layer.Dropout(0.5)
            self.head, self.out = layer.Linear(8, 2), out

        def forward(self, x):
            Net.calls += 1
            noise = torch.rand(x.shape, generator=own) + numpys.random() + pythons.random()
            return self.out(self.head(self.drop(self.hidden(self.fc(x + noise)))))

    torch.manual_seed(0)
    for net in (Net(Own(), Own()), Net(Own(), neuron.LIFNode(v_threshold=float("inf")))):
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        for _ in range(3):
            net(torch.rand(3, 4))
            loss = (net.hidden.v + net.out.v.sum()).square().sum()
            loss.backward()
            optimizer.step()
            functional.reset_net(net)
            print(loss.item(), Net.calls)
"""


def test_a_program_without_a_neuron_to_swap_runs_as_it_would(tmp_path):
    done = qif_run(tmp_path, "train.py", program=NOTHING_TO_SWAP, check=False)
    plain = new_python(textwrap.dedent(NOTHING_TO_SWAP), folder=tmp_path)
    assert plain.returncode == 0, plain.stderr
    assert done.stdout == plain.stdout
    assert done.returncode == 3
    assert done.stderr.count("has code of its own (neuronal_charge)") == 3
    assert "its threshold is not finite" in done.stderr


def test_the_trial_run_takes_no_warning_and_no_number_of_a_generator_from_the_program(tmp_path):
    program = """
        import warnings
        import torch
        from torch import nn
        from spikingjelly.activation_based import layer, neuron

        own, drawn = torch.Generator().manual_seed(1), []

        class Net(nn.Sequential):
            def forward(self, x):
                warnings.warn("the program's warning")
                noise = torch.empty_like(x).uniform_(generator=own)
                drawn.append(torch.rand(1, generator=own).item())
                return super().forward(x + noise)

        net = Net(layer.Linear(4, 4), neuron.LIFNode(), layer.Linear(4, 2), neuron.LIFNode())
        net(torch.rand(3, 4))
        print(drawn[-1])
    """
    done = qif_run(tmp_path, "train.py", program=program)
    plain = new_python(textwrap.dedent(program), folder=tmp_path)
    assert done.stdout == plain.stdout
    assert done.stderr.count("UserWarning: the program's warning") == 1
    assert "by data flow" in done.stderr


def test_programs_that_compare_classes(tmp_path):
    program = """
        from spikingjelly.activation_based import neuron

        class Mine(neuron.LIFNode):
            pass

        lif, mine, table = neuron.LIFNode(), Mine(), {neuron.LIFNode: "LIF", neuron.IFNode: "IF"}
        for node in (lif, mine):
            print(
                type(node) == neuron.LIFNode, type(node) != neuron.LIFNode, type(node) in (neuron.LIFNode, int),
                table.get(type(node)), issubclass(type(node), neuron.LIFNode), issubclass(type(node), neuron.IFNode),
                issubclass(neuron.LIFNode, type(node)), issubclass(type(node), Mine), Mine == neuron.LIFNode,
            )
    """
    done = qif_run(tmp_path, "train.py", program=program, check=False)
    assert done.stdout == new_python(textwrap.dedent(program), folder=tmp_path).stdout


def test_a_call_that_cannot_be_followed_says_so(tmp_path):
    program = """
        import torch
        from torch import nn
        from spikingjelly.activation_based import layer, neuron

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc, self.lif = nn.Linear(4, 4), neuron.LIFNode()
                self.head, self.out = nn.Linear(4, 2), neuron.LIFNode()

            def forward(self, batches):
                return self.out(self.head(self.lif(self.fc(next(batches)))))

        net, batches = Net(), (torch.rand(3, 4) for _ in range(2))
        net(batches)
        print(len(list(batches)), type(net.lif).__name__)
    """
    done = qif_run(tmp_path, "train.py", program=program)
    assert done.stdout == "1 QIFNode\n"
    assert "its data flow could not be followed: an argument cannot be copied: TypeError" in done.stderr
    assert "registration order" in done.stderr


GONE = """
    import gc, torch
    from torch import nn
    IMPORTS

    def once():
        net = nn.Sequential(nn.Linear(4, 8), NEURON, nn.Linear(8, 2), NEURON)
        twin = copy.deepcopy(net)
        for _ in range(80):
            net(torch.rand(3, 4)), twin(torch.rand(3, 4))
            RESET

    def alive():
        gc.collect()
        kinds = (torch.Tensor, nn.Module)
        return [sum(isinstance(o, kind) for o in gc.get_objects()) for kind in kinds]

    import copy
    once()
    first = alive()
    for _ in range(5):
        once()
    print("RESULT", [now - then for now, then in zip(alive(), first)])
"""


@pytest.mark.host_independent
@pytest.mark.parametrize("host", ["spikingjelly", "snntorch"])
def test_a_network_that_the_program_drops_is_gone(tmp_path, host):
    pytest.importorskip(host)
    imports, make, reset = {
        "spikingjelly": (
            "from spikingjelly.activation_based import functional, neuron", "neuron.LIFNode()",
            "functional.reset_net(net), functional.reset_net(twin)",
        ),
        # The host itself keeps every neuron that was ever built in this list.
        "snntorch": (
            "import snntorch as snn", "snn.Leaky(0.9, init_hidden=True)", "snn.SpikingNeuron.instances.clear()",
        ),
    }[host]  # fmt: skip
    program = GONE.replace("IMPORTS", imports).replace("NEURON", make).replace("RESET", reset)
    done = qif_run(tmp_path, "train.py", program=program)
    assert done.stdout == "RESULT [0, 0]\n"


def test_parts_and_functions_that_are_compiled(tmp_path):
    program = """
        import torch
        from torch import nn
        from spikingjelly.activation_based import layer, neuron

        def build():
            return nn.Sequential(layer.Linear(4, 4), neuron.LIFNode(), layer.Linear(4, 2), neuron.LIFNode())

        whole, parts = build(), nn.Sequential(layer.Linear(4, 4), build())
        whole.compile(backend="eager")
        parts[1].compile(backend="eager")
        whole(torch.rand(3, 4)), parts(torch.rand(3, 4))
        for net in (whole, parts[1]):
            print([type(net[i]).__name__ for i in (1, 3)])
    """
    done = qif_run(tmp_path, "train.py", program=program)
    assert done.stdout == "['QIFNode', 'LIFNode']\n" * 2
    assert "4 neurons" not in done.stderr


def test_a_part_that_runs_while_the_network_is_built_does_not_settle_what_reads_out(tmp_path):
    program = """
        import torch
        from torch import nn
        from spikingjelly.activation_based import functional, layer, neuron

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                features = nn.Sequential(
                    layer.Conv2d(1, 2, 3), neuron.LIFNode(), layer.Conv2d(2, 2, 3), neuron.LIFNode(),
                )
                size = features(torch.rand(1, 1, 8, 8)).numel()
                functional.reset_net(features)
                self.features, self.head = features, layer.Linear(size, 2)

            def forward(self, x):
                return self.head(self.features(x).flatten(1))

        net = Net()
        net(torch.rand(3, 1, 8, 8))
        print([type(net.features[i]).__name__ for i in (1, 3)])
    """
    done = qif_run(tmp_path, "train.py", program=program)
    assert done.stdout == "['QIFNode', 'QIFNode']\n"
    assert "2 neurons are QIF (in the place of 2 LIFNode)\n" in done.stderr


def test_neurons_whose_input_is_not_known_keep_their_gain_and_surrogate_and_do_not_rebound(tmp_path):
    done = qif_run(
        tmp_path,
        "train.py",
        program="""
            import torch
            from spikingjelly.activation_based import layer, neuron
            from torch import nn


            class Body(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.fc = nn.ModuleList(layer.Linear(6, 6) for _ in range(2))
                    self.norm = layer.BatchNorm1d(6)
                    self.spikes = [neuron.LIFNode(2.0), neuron.LIFNode(4.0, v_reset=-0.5)]

                def forward(self, x):
                    for fc, spike in zip(self.fc, self.spikes, strict=True):
                        x = spike(self.norm(fc(x)))
                    return x


            class Net(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.body, self.head = Body(), layer.Linear(6, 2)

                def forward(self, x):
                    return self.head(self.body(x))


            net = Net()
            net.body(torch.rand(4, 6))
            print([(n.dynamics, n.params.input_gain, type(n.surrogate_function).__name__) for n in net.body.spikes])
            """,
    )
    assert done.stdout.split("\n")[0] == "[('monotone', 0.5, 'Sigmoid'), ('lif', 0.25, 'Sigmoid')]"
    assert "does not tell which normalization feeds which neuron" in done.stderr


RESUMES = """
    import torch
    from spikingjelly.activation_based import functional, layer, neuron
    from torch import nn

    def build():
        lif = neuron.ParametricLIFNode()
        return nn.Sequential(layer.Linear(6, 8), nn.LayerNorm(8), lif, layer.Linear(8, 3))

    torch.manual_seed(0)
    trained, x = build(), 3 * torch.rand(4, 6)
    trained(x)
    with torch.no_grad():
        trained[2].w.fill_(-1.0)  # a tau above 2 by now
    torch.save(trained.state_dict(), "state.pt")
    resumed = build()
    resumed.load_state_dict(torch.load("state.pt"))
    functional.reset_net(trained)
    print(torch.equal(resumed(x), trained(x)), resumed[2].params.input_gain.item() < 0.3)
    lif = {name: value for name, value in trained.state_dict().items()}  # without the metadata, as LIF's
    again = build()
    again.load_state_dict(torch.load("state.pt"))
    again.load_state_dict(lif)
    again(x)
    print(again[2].params.input_gain == 1)
"""


def test_a_network_that_loads_its_checkpoint_before_its_first_call_computes_the_same(tmp_path):
    done = qif_run(tmp_path, "train.py", program=RESUMES)
    assert done.stdout.split() == ["True", "True", "True"]
    assert done.stderr.count("the input gain of its checkpoint") == 1
