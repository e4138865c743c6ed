"""Error classes, the "did you mean" helper, and the place of the shipped configurations."""

import re

import pytest

from alignvlm_pl.errors import AlignVLMError, CheckpointError, ConfigError, DataError, nearest
from alignvlm_pl.utils import installation


@pytest.mark.parametrize("error", [ConfigError, DataError, CheckpointError])
def test_every_error_is_ours_and_a_value_error(error: type[AlignVLMError]) -> None:
    assert issubclass(error, AlignVLMError)
    assert issubclass(error, ValueError)


def test_nearest_proposes_the_similar_name_and_lists_all() -> None:
    assert (
        nearest("conector", ["llm", "connector", "vision"]) == "did you mean 'connector'? known: connector, llm, vision"
    )


def test_nearest_ignores_case() -> None:
    assert nearest("alignconnector", ["AlignConnector"]).startswith("did you mean 'AlignConnector'?")


def test_nearest_does_not_guess_without_similarity() -> None:
    assert nearest("xyz", {"b", "a"}) == "known: a, b"


def test_nearest_with_nothing_known() -> None:
    assert nearest("anything", []) == "known: none"


def test_configs_dir_of_this_checkout_has_every_axis() -> None:
    folders = {path.name for path in installation.configs_dir().iterdir() if path.is_dir()}
    assert folders >= {"benchmark", "cluster", "data", "model", "recipe", "stage"}


@pytest.mark.parametrize("place", ["wheel", "checkout"])
def test_configs_dir_beside_or_inside_the_package(place: str, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "alignvlm_pl"
    configs = (package if place == "wheel" else tmp_path) / "configs"
    configs.mkdir(parents=True)
    (configs / "base.yaml").touch()
    monkeypatch.setattr(installation, "_PACKAGE", package)
    assert installation.configs_dir() == configs


def test_configs_dir_of_a_wheel_wins_over_a_stray_folder_beside_it(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "alignvlm_pl"
    for configs in (package / "configs", tmp_path / "configs"):
        configs.mkdir(parents=True)
        (configs / "base.yaml").touch()
    monkeypatch.setattr(installation, "_PACKAGE", package)
    assert installation.configs_dir() == package / "configs"


def test_missing_configs_name_both_places(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "alignvlm_pl"
    (tmp_path / "configs").mkdir()  # somebody else's folder: no base.yaml in it
    monkeypatch.setattr(installation, "_PACKAGE", package)
    inside, beside = (re.escape(str(folder / "configs")) for folder in (package, tmp_path))
    with pytest.raises(ConfigError, match=f"{inside} or {beside}.*install alignvlm_pl again"):
        installation.configs_dir()
