"""The pictures show the figures: what is drawn is read back from matplotlib's own objects."""

import io
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.image import imread

from rbm_dist.report.expert_pictures import InputMap, layer_picture, png
from tests.report.layer import layer_figures


def sample(num_experts: int, num_classes: int, rows: int = 300) -> InputMap:
    rng = np.random.default_rng(1)
    memories = np.arange(2.0 * num_experts).reshape(-1, 2)
    return InputMap(rng.normal(size=(rows, 2)), rng.integers(-1, num_classes, rows), memories, np.array([0.31, 0.12]))


def test_the_heat_map_is_expert_by_class() -> None:
    layer = layer_figures(6, 4)
    heat = layer_picture(0, layer, [0.25] * 4, sample(6, 4)).axes[0]
    drawn = heat.images[0].get_array()
    for expert in layer["experts"]:
        if expert["dead"]:
            assert np.isnan(drawn[expert["expert"]].filled(np.nan)).all(), "a dead expert has no colour"
        else:
            np.testing.assert_allclose(drawn[expert["expert"]], expert["class_share"])
    assert [label.get_text() for label in heat.get_yticklabels()][:2] == ["0  (16.7%)", "1  (dead)"]
    written = {text.get_position(): text.get_text() for text in heat.texts}
    assert written[layer["experts"][0]["class"], 0] == f"{100 * layer['experts'][0]['purity']:.0f}"


@pytest.mark.parametrize("num_classes", [3, 10, 27, 60])
def test_every_point_and_memory_is_on_the_map(num_classes: int) -> None:
    points = sample(5, num_classes, rows=900)
    share = np.random.default_rng(2).dirichlet(np.ones(num_classes))
    plane = layer_picture(1, layer_figures(5, num_classes), share.tolist(), points).axes[1]
    drawn = {each.get_label(): each for each in plane.collections}
    shown = {label for label in drawn if label.isdigit()}
    for label in shown:
        np.testing.assert_allclose(drawn[label].get_offsets(), points.points_S2[points.class_S == int(label)])
    np.testing.assert_allclose(drawn["memory"].get_offsets(), points.memories_E2)
    assert sum(len(each.get_offsets()) for each in drawn.values()) == 900 + 5
    looks = {
        (tuple(drawn[label].get_facecolor()[0]), drawn[label].get_paths()[0].vertices.tobytes()) for label in shown
    }
    assert len(looks) == len(shown) == min(num_classes, 40), "no two classes look the same"
    if num_classes > 40:
        assert shown == {str(each) for each in np.argsort(-share)[:40]}, "the most frequent ones have a colour"
    assert {text.get_text() for text in plane.texts} == {str(expert) for expert in range(5)}
    assert "31%" in plane.get_xlabel()


def test_memories_that_coincide_share_a_label() -> None:
    points = sample(3, 2)
    points.memories_E2[2] = points.memories_E2[0] + 0.001
    plane = layer_picture(0, layer_figures(3, 2), [0.5, 0.5], points).axes[1]
    assert {text.get_text() for text in plane.texts} == {"0, 2", "1"}


def test_classes_have_their_names() -> None:
    names = ["_under", "$x_{", "a name of more than sixteen letters"]
    picture = layer_picture(0, layer_figures(4, 3), [1 / 3] * 3, sample(4, 3), names)
    heat, plane = picture.axes[:2]
    shown = ["_under", "$x_{", "a name of more …"]
    assert [label.get_text() for label in heat.get_xticklabels()] == shown
    legend = [text.get_text() for text in plane.get_legend().get_texts()]
    assert legend == [*(f"{cls}: {name}" for cls, name in enumerate(shown)), "none", "memory"]
    assert len(png(picture)) > 10_000, "no name is taken for a formula"


@pytest.mark.parametrize(("experts", "classes", "labelled"), [(1, 2, False), (8, 10, True), (64, 172, True)])
def test_a_png_is_whole_and_reproducible(experts: int, classes: int, labelled: bool) -> None:
    layer, points = layer_figures(experts, classes, dead=0), sample(experts, classes)
    share = [1 / classes] * classes if labelled else None
    first, second = (png(layer_picture(0, layer, share, points)) for _ in range(2))
    assert first == second
    height, width, _ = imread(io.BytesIO(first)).shape
    assert 1000 < width < 3200
    assert 600 < height < 1500


def test_the_command_line_does_not_wait_for_matplotlib() -> None:
    script = "import sys, rbm_dist.cli, rbm_dist.report.expert_pictures; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
