"""Which models an ablation trains, and what its table makes of their scores."""

from dataclasses import asdict

import pytest

from fsdino.config import SegmenterConfig
from fsdino.errors import UserError
from pipelines import ablation, sequence
from pipelines.cli import parse
from pipelines.recipes import RECIPES
from pipelines.reproduce import Settings


def changes(one, other):
    return {key: value for key, value in asdict(one).items() if value != asdict(other)[key]}


def test_each_model_departs_from_the_recipe_in_one_switch_which_is_then_the_papers():
    recipe, paper = RECIPES["offline"](), SegmenterConfig()
    models = ablation.ablations(recipe.model, recipe.episodic)
    assert models.pop(ablation.OWN) == ablation.Ablation(recipe.model, recipe.episodic)
    assert changes(models.pop("--no-neighbours").model, recipe.model) == {"neighbours": False, "self_support": False}
    assert changes(models.pop("--no-semantic-prompt").model, recipe.model) == {"semantic_prompt": False}
    assert changes(models.pop("--adapter joint").model, recipe.model) == {"adapter": "joint"}
    assert {"--variant 4d", "--no-fuse", "--no-contrast", "--balance 0.0", "--no-flip"} < models.keys()
    for name, one in models.items():
        changed = changes(one.model, recipe.model) | changes(one.episodic, recipe.episodic)
        assert len(changed) == 1, name
        field, value = changed.popitem()
        if hasattr(paper, field):
            assert value == getattr(paper, field), name


def test_switches_of_the_correlation_are_left_alone_where_there_is_none():
    recipe = RECIPES["demo"]()
    assert "--no-refine" in ablation.ablations(recipe.model, recipe.episodic)
    compact = ablation.ablations(RECIPES["offline"]().model, recipe.episodic)
    assert not {"--no-refine", "--support-weights mask", "--similarity cosine"} & compact.keys()


def test_the_table_pairs_each_model_with_the_recipes_own_of_fold_and_seed():
    scores = {
        ablation.OWN: {0: {0: 0.50, 1: 0.52}, 2: {0: 0.60, 1: 0.61}},
        "--no-fuse": {0: {0: 0.49, 1: 0.52}, 2: {0: 0.58, 1: 0.60}},  # worth 1, 0, 2 and 1: by seed 1.5 and 0.5
    }
    assert ablation.table(scores)[2:] == [
        "| as it is: mIoU | 51.0 | 60.5 | 55.8 ± 1.1 | |",
        "| `--no-fuse` | +0.5 | +1.5 | +1.0 ± 0.7 | 3 of 4 |",
    ]


def test_an_ablation_trains_and_scores_every_model_on_every_fold_with_every_seed():
    flags = ["--recipe", "offline", "--ablate", "--folds", "0", "2", "--train-seeds", "2", "--seed", "3"]
    study = parse(Settings, flags)
    steps = [step for step in sequence.plan(study) if step.command == "train_episodic"]
    results = {"distil": {"adapter": "a"}}
    asked = [(step.own(results)["fold"], step.own(results)["workers"].seed) for step in steps]
    models = len(ablation.ablations(study.model, study.episodic))
    assert {pair: asked.count(pair) for pair in asked} == {(f, s): models for f in (0, 2) for s in (3, 4)}
    scored = [step.title for step in sequence.plan(study) if step.command == "evaluate"]
    assert scored == [title for *_, title in sequence.ablation_titles(study, study.folds)]


def test_an_ablation_and_a_table_of_the_paper_exclude_each_other():
    with pytest.raises(UserError, match="--ablate, --table 4: expected one of them"):
        sequence.asked(parse(Settings, ["--recipe", "offline", "--ablate", "--table", "4"]))
