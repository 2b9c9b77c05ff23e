from pathlib import Path

import pytest

from regraft.errors import UsageError
from regraft.training.cautions import cautions
from regraft.training.recipe import Phase, Recipe
from regraft.training.settings import parse_assignments


def resolved(recipe: Recipe, images: int = 2000, norm: str = "batch", grey: bool = False) -> Recipe:
    return recipe.resolved(normalisation=norm, num_images=images, is_grey=grey)


@pytest.mark.parametrize(
    "recipe", [Recipe.scratch(), Recipe.transfer("lp-ft"), Recipe.transfer("last:2")]
)
def test_a_printed_recipe_reads_back_equal(recipe: Recipe, tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text(recipe.to_toml())
    assert Recipe.from_toml(file) == recipe
    file.write_text(resolved(recipe).to_toml())
    assert Recipe.from_toml(file) == resolved(recipe)


def test_every_key_of_a_printed_recipe_is_explained() -> None:
    text = Recipe.transfer("lp-ft").to_toml()
    for name in (*Recipe.model_fields, *Phase.model_fields):
        if name != "phases":
            before = text[: text.index(f"\n{name} = ")].rsplit("\n", 1)[-1]
            assert before.startswith("# "), name


@pytest.mark.fault("E1")
def test_unknown_keys_are_errors_with_a_suggestion(tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text("batchsize = 4\nseed = -1\n[[phases]]\nepoch = 3\n")
    with pytest.raises(UsageError) as refused:
        Recipe.from_toml(file)
    text = str(refused.value)
    assert f"recipe `{file}` cannot be used: 3 problems" in text
    assert "unknown key `batchsize`; did you mean `batch_size`?" in text
    assert "unknown key `epoch`; did you mean `epochs`?" in text
    assert "`seed`: Input should be greater than or equal to 0, not `-1`" in text
    assert "pydantic" not in text


@pytest.mark.parametrize(
    ("text", "complaint"),
    [("seed = [", "is no TOML"), (None, "cannot be read")],
)
def test_a_recipe_that_is_no_file_or_no_toml_is_refused(
    tmp_path: Path, text: str | None, complaint: str
) -> None:
    file = tmp_path / "recipe.toml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UsageError, match=complaint):
        Recipe.from_toml(file)


@pytest.mark.parametrize(
    "changes",
    [{"epochs": 0}, {"lr": -1.0}, {"augment": "wild"}, {"image_size": 0}, {"nonsense": 1}],
)
@pytest.mark.fault("E3")
def test_values_out_of_range_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="the recipe cannot be used"):
        Recipe.scratch().changed(changes)


def test_epochs_and_lr_go_to_the_phases_that_iterate() -> None:
    head, everything = Recipe.transfer("lp-ft").changed({"epochs": 7, "lr": 0.5}).phases
    assert (head.learns, head.epochs) == ("head", 1)
    assert (everything.learns, everything.epochs, everything.lr) == ("all", 7, 0.5)


@pytest.mark.parametrize("key", ["epochs", "lr"])
def test_what_would_change_nothing_is_refused(key: str) -> None:
    with pytest.raises(UsageError, match=f"`{key}` would change nothing"):
        Recipe.transfer("head").changed({key: 3})
    with pytest.raises(UsageError, match="a head alone is solved in 1 epoch"):
        Recipe.scratch().changed({"phases": [{"learns": "head", "epochs": 3}]})


def test_assignments_are_read_as_toml() -> None:
    given = ["augment=none", "ema_decay=0.9", "image_size=[64, 48]", "optimizer = 'sgd'"]
    assert parse_assignments(given) == {
        "augment": "none", "ema_decay": 0.9, "image_size": [64, 48], "optimizer": "sgd",
    }  # fmt: skip
    with pytest.raises(UsageError, match="has no `=`"):
        parse_assignments(["augment"])


@pytest.mark.parametrize(
    ("strategy", "learns"),
    [("head", ["head"]), ("last:2", ["head", "last:2"]), ("full", ["all"]),
     ("lp-ft", ["head", "all"])],
)  # fmt: skip
def test_strategies_are_phases(strategy: str, learns: list[str]) -> None:
    assert [phase.learns for phase in Recipe.transfer(strategy).phases] == learns


@pytest.mark.parametrize("strategy", ["all", "last:0", "last:", "LP-FT"])
def test_an_unknown_strategy_is_refused(strategy: str) -> None:
    with pytest.raises(UsageError, match=r"use auto, head, last:<n>, lp-ft or full"):
        Recipe.transfer(strategy)


@pytest.mark.parametrize(("images", "batch"), [(20, 16), (640, 32), (1500, 64), (50_000, 128)])
def test_the_batch_grows_with_the_data(images: int, batch: int) -> None:
    assert resolved(Recipe.scratch(), images).batch_size == batch


def test_nothing_is_left_open_when_resolved() -> None:
    for recipe in (Recipe.scratch(), Recipe.transfer("last:1")):
        settled = resolved(recipe.changed({"image_size": 32, "channels": 3}))
        assert "auto" not in settled.model_dump_json()


@pytest.mark.parametrize(
    ("norm", "optimizer", "lr"),
    [("batch", "sgd", 0.1), ("none", "sgd", 0.05), ("other", "adamw", 0.001)],
)
def test_the_learning_rate_follows_the_normalisation(norm: str, optimizer: str, lr: float) -> None:
    scratch = resolved(Recipe.scratch(), 50_000, norm)
    transfer = resolved(Recipe.transfer("full"), 50_000, norm)
    assert scratch.optimizer == optimizer
    assert scratch.phases[0].lr == pytest.approx(lr)
    assert transfer.phases[0].lr == pytest.approx(lr / 10)


def test_grey_images_are_never_mirrored_unasked() -> None:
    assert resolved(Recipe.scratch(), grey=True).augment == "gentle"
    assert resolved(Recipe.scratch(), grey=False).augment == "natural"


def test_the_control_learns_everything_at_the_scratch_rate_for_longer() -> None:
    transfer = resolved(Recipe.transfer("lp-ft"), 200)
    control = resolved(transfer.as_scratch(), 200)
    assert [phase.learns for phase in control.phases] == ["all"]
    assert control.phases[0].lr == pytest.approx(10 * float(transfer.phases[1].lr))
    assert control.phases[0].warmup > 0
    assert control.phases[0].layer_decay == 1.0
    assert control.phases[0].batch_norm == "train"
    assert control.num_epochs >= transfer.num_epochs
    for same in ("batch_size", "augment", "image_size", "seed", "ema_decay"):
        assert getattr(control, same) == getattr(transfer, same)


def test_the_control_of_a_probe_still_trains() -> None:
    control = resolved(resolved(Recipe.transfer("head"), 200).as_scratch(), 200)
    assert int(control.phases[0].epochs) >= 60


@pytest.mark.parametrize(
    ("goal", "changes", "images", "grey", "told"),
    [
        ("scratch", {"augment": "natural"}, 500, True, ["`augment` = natural"]),
        ("transfer", {"augment": "trivial"}, 500, True, ["`augment` = trivial"]),
        ("scratch", {"augment": "natural"}, 500, False, []),
        ("scratch", {}, 500, True, []),
        ("transfer", {"mixup": 0.2}, 19_999, False, ["`mixup` seldom pays"]),
        ("transfer", {"mixup": 0.2}, 20_000, False, []),
        ("scratch", {"label_smoothing": 0.1}, 500, False, ["a head on frozen stages worse"]),
        ("transfer", {"label_smoothing": 0.1}, 500, False, []),
    ],
)
def test_what_seldom_pays_is_done_and_told(
    goal: str, changes: dict[str, object], images: int, grey: bool, told: list[str]
) -> None:
    recipe = Recipe.scratch() if goal == "scratch" else Recipe.transfer("lp-ft")
    asked = resolved(recipe.changed(changes), images=images, grey=grey)
    found = list(cautions(asked, num_images=images, is_grey=grey))
    assert len(found) == len(told)
    assert all(part in caution for part, caution in zip(told, found, strict=True))
    assert asked.augment == changes.get("augment", "gentle" if grey else "natural")
