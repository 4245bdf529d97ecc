"""`qif phase`: fixed points, regions and figure."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qif_plugins import QIFParameters
from qif_plugins.cli import main
from qif_plugins.neuron.phase import fixed_points, regions, trajectory

pytestmark = pytest.mark.host_independent


@given(a=st.floats(0.01, 0.5), u1=st.floats(-0.5, 0.2), u2=st.floats(-2, 0.6), current=st.floats(-2, 2))
def test_fixed_points_are_fixed_and_classified(a, u1, u2, current):
    params = QIFParameters.unchecked(a=a, u1=u1, u2=u2, v_threshold=0.5)
    points = fixed_points(params, current)
    for point in points:
        assert params.map(point.v) + current == pytest.approx(point.v, abs=1e-9 * (1 + abs(point.v)) / a)
        if abs(abs(point.slope) - 1) > 1e-3:
            near = trajectory(params, point.v + 1e-6, 1, current)
            assert (abs(near[1] - point.v) < 1e-6) == point.stable
    if len(points) == 2:
        assert points[0].v < points[1].v
        assert points[1].slope >= 1


def test_fixed_points_are_those_of_the_parameters():
    params = QIFParameters(a=0.3, u1=-0.1, u2=0.4)
    assert [point.v for point in fixed_points(params)] == pytest.approx(params.fixed_points(), abs=1e-12)


@given(
    a=st.floats(0.05, 0.5),
    threshold=st.floats(0.3, 1.5),
    current=st.floats(-1.5, 1.5),
    v=st.floats(-8, 8),
)
def test_regions_cover_the_line_and_hold_what_they_say(a, threshold, current, v):
    params = QIFParameters.unchecked(a=a, u1=0.0, u2=0.5, v_threshold=threshold)
    found = regions(params, current)
    assert found[0].lo == -math.inf
    assert found[-1].hi == math.inf
    assert all(left.hi == right.lo for left, right in itertools.pairwise(found))
    region = next(region for region in found if region.lo <= v < region.hi)
    if min(abs(v - region.lo), abs(v - region.hi)) < 1e-6:
        return
    fires_next = params.map(v) + current >= threshold
    if region.name in ("fire", "runaway"):
        assert v >= threshold
    else:
        assert v < threshold
        assert fires_next == (region.name == "rebound")
    if region.name == "runaway" and fixed_points(params, current):
        path = trajectory(params, v, 3, current)
        assert all(after >= before for before, after in itertools.pairwise(path))


def test_trajectory_stops_before_infinity():
    path = trajectory(QIFParameters(), 1e150, 12)
    assert len(path) < 13
    assert all(map(math.isfinite, path))


def test_command_prints_and_draws(tmp_path, capsys):
    out = tmp_path / "deep" / "phase.png"
    assert main(["phase", "--dynamics", "paper", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "           0      -0.125   stable, approached with alternating sign" in shown
    assert "         4.5       2.125   unstable, left from one side" in shown
    assert "returns to rest" in shown
    assert out.read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in out.parent.iterdir()] == ["phase.png"]
    assert main(["phase", "--out", str(out.with_suffix(".PDF"))]) == 0
    assert out.with_suffix(".PDF").read_bytes().startswith(b"%PDF")


def test_command_above_the_bifurcation(tmp_path, capsys):
    assert main(["phase", "--input", "1.5", "--out", str(tmp_path / "phase.png")]) == 0
    assert "above the saddle-node bifurcation" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--a", "0"], "a must be positive"),
        (["--dynamics", "paper", "--threshold", "4.5"], "unstable fixed point 4.5"),
        (["--u1", "nan"], "u1 must be finite"),
        (["--input", "inf"], "--input must be finite"),
        (["--start", "0", "nan"], "--start must be finite"),
        (["--a", "1e200"], "the fixed points of a=1e+200, u1=0, u2=0.5 are beyond"),
        (["--out", "phase.docx"], "phase.docx; give it one of the suffixes .eps, "),
    ],
)
def test_command_refuses_before_writing(words, message, tmp_path, capsys):
    out = tmp_path / "phase.png"
    out.write_bytes(b"old")
    assert main(["phase", "--out", str(out), *words]) == 2
    assert message in capsys.readouterr().err
    assert out.read_bytes() == b"old"


def test_command_reports_a_file_it_cannot_write(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["phase", "--out", str(tmp_path / "file" / "phase.png")]) == 2
    assert capsys.readouterr().err.startswith("qif phase: ")
