"""Which evaluations share a row, and which are told apart."""

import pytest

from fsdino.errors import UserError
from pipelines import report, tables, tracking

IDENTITY = {
    "dataset": "set",
    "shots": 1,
    "episodes": 10,
    "test_seed": 0,
    "rules.name": "hdmnet",
    "method": "4d",
    "late.model": "dinov2_vitb14",
    "late.res_px": 518,
    "model.contrast": False,
    "trained.seed": 0,
}


@pytest.fixture
def uri(tmp_path):
    return f"sqlite:///{tmp_path}/mlflow.db"


def log(uri, fold, miou, **changes):
    """An evaluation as `evaluate` logs it; the newest comes last."""
    params = IDENTITY | {"fold": fold, "images": f"images{fold}", "checkpoint": f"checkpoint{fold}"}
    params |= {key.replace("__", "."): value for key, value in changes.items()}
    with tracking.running(uri, "evaluate", "run", params) as run:
        run.log(0, miou=miou, fb_iou=miou + 0.2)


def gather(uri):
    methods = tables.gather(uri, dataset="set", shots=1, episodes=10, test_seed=0)
    return {name: {f: s["miou"] for f, s in method.folds.items()} for name, method in methods.items()}


def test_folds_of_one_identity_share_a_row_and_its_mean(uri):
    for fold in range(4):
        log(uri, fold, 0.1 * fold)
    methods = tables.gather(uri, dataset="set", shots=1, episodes=10, test_seed=0)
    assert {f: s["miou"] for f, s in methods["4d"].folds.items()} == pytest.approx(
        {"0": 0, "1": 0.1, "2": 0.2, "3": 0.3}
    )
    assert tables.markdown("set, 1-shot", methods).splitlines()[-1] == (
        "| 4d | 0.0 (20.0) | 10.0 (30.0) | 20.0 (40.0) | 30.0 (50.0) | 15.0 (35.0) |"
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"late__model": "dinov2_vitl14"}, "late.model dinov2_vitb14"),
        ({"late__res_px": 252}, "late.res_px 518"),
        ({"model__contrast": True}, "model.contrast False"),
        ({"trained__seed": 1}, "trained.seed 0"),
        ({"rules__name": "hsnet"}, "rules.name hdmnet"),
    ],
)
def test_runs_that_differ_in_more_than_the_fold_never_share_a_row(uri, change, said):
    log(uri, 0, 0.5)
    log(uri, 1, 0.7, **change)
    assert gather(uri) == {"4d": {"1": 0.7}, f"4d ({said})": {"0": 0.5}}  # the newest keeps the short name


def test_of_two_checkpoints_of_a_fold_the_newest_is_shown_and_that_is_said(uri, capsys):
    log(uri, 0, 0.5)
    log(uri, 0, 0.6, checkpoint="retrained")
    assert gather(uri) == {"4d": {"0": 0.6}}
    assert "4d, fold 0: several checkpoints; the newest is shown" in capsys.readouterr().err


def test_a_report_on_nothing_is_a_users_mistake(uri):
    log(uri, 0, 0.5)
    with pytest.raises(UserError, match=r"expected evaluations of set, 5-shot, .* found none; run evaluate first"):
        report.job(report.Settings(tracking_uri=uri, dataset="set", shots=5, episodes=10))
