"""Which models an ablation trains, and what its table makes of their scores."""

from dataclasses import asdict, replace

import pytest

from fsdino.config import SegmenterConfig
from fsdino.errors import UserError
from pipelines import ablation, sequence, train_episodic
from pipelines.cli import parse
from pipelines.recipes import RECIPES
from pipelines.reproduce import Settings


def changes(one, other):
    return {key: value for key, value in asdict(one).items() if value != asdict(other)[key]}


def test_each_model_departs_from_the_recipe_in_one_switch_which_is_then_the_papers():
    recipe, paper = RECIPES["offline"](), SegmenterConfig()
    models = ablation.changes(recipe.model, recipe.episodic)
    own = replace(recipe.model, presence=False)
    assert models.pop(ablation.OWN) == (own, recipe.episodic)
    assert changes(models.pop("--no-neighbours")[0], own) == {"neighbours": False, "self_support": False}
    assert changes(models.pop("--no-semantic-prompt")[0], own) == {"semantic_prompt": False}
    assert changes(models.pop("--adapter joint")[0], own) == {"adapter": "joint"}
    assert {"--variant 4d", "--no-fuse", "--no-contrast", "--balance 0.0", "--no-flip"} < models.keys()
    for name, (model, episodic) in models.items():
        changed = changes(model, own) | changes(episodic, recipe.episodic)
        assert len(changed) == 1, name
        field, value = changed.popitem()
        if hasattr(paper, field):
            assert value == getattr(paper, field), name


@pytest.mark.parametrize("recipe", ["paper", "offline", "demo"])
def test_the_flag_that_names_a_model_makes_it(recipe):
    settings = parse(train_episodic.Settings, ["--recipe", recipe, "--fold", "0"])
    models = ablation.changes(settings.model, settings.episodic)
    for name, (model, episodic) in list(models.items())[1:]:
        flags = name.split() + (["--no-self-support"] if name == "--no-neighbours" else [])
        changed = parse(train_episodic.Settings, ["--recipe", recipe, "--fold", "0", "--no-presence", *flags])
        assert (changed.model, changed.episodic) == (model, episodic), name


def test_switches_of_the_correlation_are_left_alone_where_there_is_none():
    recipe = RECIPES["demo"]()
    correlated = ablation.changes(recipe.model, recipe.episodic)
    assert {"--no-refine", "--start pytorch"} < correlated.keys()
    compact = ablation.changes(RECIPES["offline"]().model, recipe.episodic)
    assert not {"--no-refine", "--support-weights mask", "--similarity cosine", "--start pytorch"} & compact.keys()


def test_the_table_pairs_each_model_with_the_recipes_own_of_fold_and_seed():
    scores = {
        ablation.OWN: {0: {0: 0.50, 1: 0.52}, 2: {0: 0.60, 1: 0.61}},
        "--no-fuse": {0: {0: 0.49, 1: 0.52}, 2: {0: 0.58, 1: 0.60}},  # 1, 0, 2 and 1 less: by seed 1.5 and 0.5
    }
    assert ablation.table(scores)[2:] == [
        "| as it is: mIoU | 51.0 | 60.5 | 55.8 ± 1.1 | |",
        "| `--no-fuse` | -0.5 | -1.5 | -1.0 ± 0.7 | 3 of 4 |",
    ]


def test_an_ablation_trains_and_scores_every_model_on_every_fold_with_every_seed():
    flags = ["--recipe", "offline", "--ablate", "--folds", "0", "2", "--train-seeds", "2", "--seed", "3"]
    study = parse(Settings, flags)
    plan = sequence.plan(study)
    steps = [step for step in plan if step.command == "train_episodic"]
    results = {"distil": {"adapter": "a"}}
    asked = [(step.own(results)["fold"], step.own(results)["workers"].seed) for step in steps]
    models = len(ablation.changes(study.model, study.episodic))
    assert {pair: asked.count(pair) for pair in asked} == {(f, s): models for f in (0, 2) for s in (3, 4)}
    tried = sequence.trials_of(study)
    assert [step.title for step in plan if step.command == "evaluate"] == [trial.title for trial in tried]
    scored = ablation.scores_of(tried, {trial.title: {"miou": trial.fold + trial.seed / 10} for trial in tried})
    assert scored["--no-fuse"] == {0: {3: 0.3, 4: 0.4}, 2: {3: 2.3, 4: 2.4}}


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--ablate", "--table", "4"], "--ablate, --table 4: expected one of them"),
        (["--ablate", "--shots", "1", "5"], "--ablate: scores one support"),
        (["--ablate", "--adapter", "joint"], "--adapter joint: expected distilled"),
        (["--train-seeds", "2"], "--train-seeds 2: is of --ablate"),
        (["--self-support", "--no-neighbours"], "turn that on as well"),
    ],
)
def test_flags_that_exclude_each_other_are_refused(flags, said):
    with pytest.raises(UserError, match=said):
        sequence.asked(parse(Settings, ["--recipe", "offline", *flags]))
