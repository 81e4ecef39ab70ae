"""Self-similarity against values by hand, and what agreement must not depend on."""

import pytest
import torch

from fsdino.encoder import build_encoder
from fsdino.errors import UserError
from fsdino.similarity import agreement, self_similarity
from pipelines import analyze_layers, tracking
from pipelines.cli import parse


def test_self_similarity_is_the_cosine_of_positions():
    features = torch.tensor([[1.0, 0.0], [3.0, 4.0]]).T.reshape(1, 2, 1, 2)
    features = torch.cat([features, -features], dim=2)  # a grid of 2: the lower row is the opposite of the upper
    expected = torch.tensor([[1.0, 0.6, -1.0, -0.6], [0.6, 1.0, -0.6, -1.0]])
    torch.testing.assert_close(self_similarity(features)[0, :2], expected)


def test_networks_that_differ_by_a_rotation_agree_wholly_and_unrelated_ones_not_at_all():
    torch.manual_seed(0)
    features = torch.randn(3, 8, 6, 6)
    rotation, _ = torch.linalg.qr(torch.randn(8, 8))
    rotated = 5 * torch.einsum("dc,bchw->bdhw", rotation, features)
    torch.testing.assert_close(agreement(features, rotated), torch.ones(3))
    assert agreement(features, torch.randn(3, 8, 6, 6)).abs().max() < 0.2


def test_agreement_is_computed_on_the_coarser_grid():
    features = torch.randn(2, 8, 4, 4)
    fine = features.repeat_interleave(3, dim=2).repeat_interleave(3, dim=3)
    torch.testing.assert_close(agreement(features, fine), torch.ones(2))


@torch.no_grad()
def test_layer_maps_hold_the_early_layer_and_every_other():
    encoder = build_encoder("tiny_vit")
    x = torch.randn(1, 3, 56, 56)
    maps = encoder.layer_maps(x)
    assert list(maps) == ["1", "2", "3", "4"] and torch.equal(maps["3"], encoder(x).early)
    lite = build_encoder("tf_efficientnet_lite0").layer_maps(torch.randn(1, 3, 64, 64))
    strides = (2, 4, 8, 16, 16, 32, 32)
    assert list(lite) == [f"blocks {n}, stride {stride}" for n, stride in enumerate(strides)]


def test_the_command_scores_every_layer_and_keeps_table_plot_and_maps(shapes_root, tmp_path):
    arguments = ["--recipe", "tiny", "--data", str(shapes_root), "--tracking-uri", f"sqlite:///{tmp_path}/m.db"]
    settings = parse(analyze_layers.Settings, [*arguments, "--images", "4", "--plot", str(tmp_path / "layers.png")])
    result = analyze_layers.job(settings)
    assert list(result["agreement"]) == ["1", "2", "3", "4"] and result["best"] in result["agreement"]
    assert all(-1 <= r <= 1 for r in result["agreement"].values())
    assert (tmp_path / "layers.png").exists() and (tmp_path / "layers-maps.png").exists()
    client = tracking.MlflowClient(f"sqlite:///{tmp_path}/m.db")
    (run,) = client.search_runs([client.get_experiment_by_name("analyze/shapes").experiment_id])
    logged = [m.value for m in client.get_metric_history(run.info.run_id, "agreement")]
    assert logged == list(result["agreement"].values())
    assert {a.path for a in client.list_artifacts(run.info.run_id, "panels")} == {
        "panels/layers.png",
        "panels/maps.png",
    }


def test_mistakes_are_told_before_the_work(shapes_root, tmp_path, capsys):
    arguments = ["--recipe", "tiny", "--data", str(shapes_root), "--tracking-uri", f"sqlite:///{tmp_path}/m.db"]
    for flags, said in (
        (["--plot", str(tmp_path / "none" / "x.png")], "expected a .png file in a folder that exists"),
        (["--plot", str(tmp_path / "x.jpg")], "expected a .png file"),
        (["--res", "100"], "--res 100: tiny_vit needs a multiple of 14"),
        (["--early-norm"], "layers are compared without any norm"),
    ):
        with pytest.raises(UserError, match=said):
            analyze_layers.job(parse(analyze_layers.Settings, [*arguments, "--images", "4", *flags]))
