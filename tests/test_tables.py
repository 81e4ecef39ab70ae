"""Which evaluations share a row, and which are told apart."""

import pytest

from fsdino.errors import UserError
from pipelines import report, report_pages, tables, tracking
from pipelines.published import ROWS
from pipelines.runs import About

IDENTITY = {
    "dataset": "set",
    "shots": 1,
    "fusion": "None",
    "absent": "False",
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
    with tracking.running(uri, About("evaluate", "pascal-5i", "run", params)) as run:
        run.log(0, miou=miou, fb_iou=miou + 0.2)


def gather(uri):
    methods = tables.gather(uri, dataset="set", shots=1, episodes=10)
    return {name: {f: method.cell(f, "miou")[0] for f in method.folds} for name, method in methods.items()}


def test_folds_of_one_identity_share_a_row_and_its_mean(uri):
    for fold in range(4):
        log(uri, fold, 0.1 * fold)
    assert gather(uri)["4d"] == pytest.approx({"0": 0, "1": 0.1, "2": 0.2, "3": 0.3})
    methods = tables.gather(uri, dataset="set")
    assert tables.markdown(tables.scores("set, 1-shot", methods)).splitlines()[-1] == (
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


def test_models_of_another_data_set_are_told_by_the_folds_that_they_are_tested_on_or_else_trained_on(uri):
    for fold in range(2):  # COCO-20i, by the model of fold 0
        log(uri, fold, 0.1 + 0.1 * fold, trained__dataset="other", trained__fold=0, folds="4 f+4v")
    for fold in range(2):  # FSS-1000 has one fold
        of = {"trained__dataset": "other", "trained__fold": fold, "folds": "1 its own", "dataset": "one-fold"}
        log(uri, 0, 0.5 + 0.1 * fold, **of, images="images0")
    assert gather(uri)["4d"] == pytest.approx({"0": 0.1, "1": 0.2})
    (alone,) = tables.gather(uri, dataset="one-fold").values()
    assert {f: alone.cell(f, "miou")[0] for f in alone.folds} == pytest.approx({"0": 0.5, "1": 0.6})


def test_a_model_of_all_classes_has_a_row_of_its_own(uri):
    of_folds = {"trained__dataset": "other", "folds": "4 f+4v"}
    log(uri, 0, 0.5, **of_folds, trained__fold=0)
    log(uri, 0, 0.6, **of_folds, trained__fold=None)
    log(uri, 0, 0.7, trained__dataset="other", trained__fold=None, folds="1 its own", dataset="one-fold")
    assert gather(uri) == {"4d": {"0": 0.6}, "4d (trained.classes base)": {"0": 0.5}}
    (alone,) = tables.gather(uri, dataset="one-fold").values()
    assert alone.cell("0", "miou")[0] == pytest.approx(0.7)


def test_of_two_checkpoints_of_a_fold_the_newest_is_shown_and_that_is_said(uri, capsys):
    log(uri, 0, 0.5)
    log(uri, 0, 0.6, checkpoint="retrained")
    assert gather(uri) == {"4d": {"0": 0.6}}
    assert "4d, fold 0: several checkpoints or images; the newest are shown" in capsys.readouterr().err


def test_a_report_on_nothing_is_a_users_mistake(uri):
    log(uri, 0, 0.5)
    with pytest.raises(UserError, match=r"expected evaluations of another, found none; run evaluate first"):
        report.job(report.Settings(tracking_uri=uri, dataset="another"))


def test_test_seeds_of_a_fold_are_one_cell_with_their_deviation(uri):
    for fold in range(4):
        for seed, miou in enumerate((0.1, 0.2, 0.3)):
            log(uri, fold, miou + 0.1 * fold, test_seed=seed)
    methods = tables.gather(uri, dataset="set")
    assert methods["4d"].cell("2", "miou") == pytest.approx((0.4, 0.1))
    assert methods["4d"].mean("miou") == pytest.approx((0.35, 0.1))
    last = tables.markdown(tables.scores("set", methods)).splitlines()[-1]
    assert last.startswith("| 4d | 20.0 ± 10.0 (40.0) | 30.0 ± 10.0 (50.0) |") and last.endswith(
        "| 35.0 ± 10.0 (55.0) |"
    )


def test_tables_1_to_4_hold_the_papers_rows_and_ours_with_missing_cells(uri):
    for fold in range(4):
        log(uri, fold, 0.5, dataset="pascal-5i")
    log(uri, 0, 0.6, dataset="pascal-5i", shots=5)
    text = report_pages.markdown(report.gathered(report.Settings(tracking_uri=uri)))
    table1 = text.split("## Table 1")[1].split("## ")[0]
    paper = next(line for line in table1.splitlines() if line.startswith("| FS-DINO |"))
    assert "75.6 | 80.3 | 72.2 | 73.4 | 75.4 | 78.1 | 83.1 | 73.6 | 76.3 | 77.8" in paper
    ours = next(line for line in table1.splitlines() if line.startswith("| **4d**"))
    assert "| 50.0 | 50.0 | 50.0 | 50.0 | 50.0 | 60.0 | - | - | - | - |" in ours
    table4 = text.split("## Table 4")[1].split("## ")[0]
    assert "| FS-DINO, BA+SVP+PCS+4D | COCO-20i | 62.4 | 79.0 |" in table4
    assert "| Matcher | DINOv2-L, SAM-H | its own | 87.1 | - |" in text.split("## Table 3")[1]


def test_published_means_are_those_of_their_folds_unless_a_note_says_otherwise():
    for row in ROWS:
        for values in (row.one, row.five):
            if len(values) == 5 and "average" not in row.note:
                assert sum(values[:4]) / 4 == pytest.approx(values[4], abs=0.11), row
