"""Recipes and the command line compose to a RunConfig, or to one ConfigError that helps."""

import pytest

from moba_train.config.compose import compose, group_options, run_command_line
from moba_train.config.schema import ConfigError, RunConfig, from_dict, to_dict


@pytest.mark.parametrize("recipe", group_options("recipe"))
def test_every_recipe_composes_under_its_own_name(recipe):
    assert compose([f"recipe={recipe}"]).recipe == recipe


@pytest.mark.parametrize("model", group_options("model"))
def test_a_model_chosen_by_name_keeps_its_name(model):
    assert compose([f"model={model}"]).model.name == model


def test_the_recipes_and_models_that_users_rely_on_exist():
    assert {"tiny", "8k", "32k", "128k", "1m"} <= set(group_options("recipe"))
    assert {"tiny", "llama3.2-1b", "llama3.1-8b", "qwen3-8b"} <= set(group_options("model"))


def test_the_command_line_wins_over_the_recipe():
    config = compose(["recipe=128k", "attention.top_k=5", "train.steps=7", "data.blend={a:0.25,b:3}", "data.path=null"])
    assert (config.attention.top_k, config.train.steps, config.data.path) == (5, 7, None)
    assert config.data.blend == {"a": 0.25, "b": 3.0}


def test_a_pattern_with_commas_needs_no_quotes():
    assert compose(["attention.pattern=moba*3,full"]).attention.pattern == "moba*3,full"
    assert compose(['attention.pattern="moba*3,full"']).attention.pattern == "moba*3,full"


@pytest.mark.parametrize("path", ["a=b,c", "with space", "x(1)", 'C:\\runs\\"q"', "~/runs", "über/läufe"])
def test_any_path_needs_no_quotes(path):
    assert compose([f"run.dir={path}"]).run.dir == path
    assert compose(['attention.pattern="full,moba"']).attention.pattern == "full,moba"


def test_a_group_can_be_swapped_under_a_recipe():
    assert compose(["recipe=tiny", "attention=full"]).attention.pattern == "full"


def test_the_configuration_survives_its_own_dictionary():
    config = compose(["recipe=1m"])
    assert from_dict(to_dict(config)) == config


@pytest.mark.parametrize(
    "override, key, remedy",
    [
        ("attention.topk=3", "attention.topk", "attention.top_k"),
        ("foo=1", "foo", "attention, checkpoint"),
        ("+attention.foo=1", "attention.foo", "block_size"),
        ("model.rope_scaling.factr=2", "model.rope_scaling.factr", "model.rope_scaling.factor"),
        ("recipe=5k", "recipe", "128k"),
        ("model=gpt5", "model", "llama3.1-8b"),
        ("train.steps=abc", "train.steps", "int"),
        ("train.steps=1.5", "train.steps", "int"),
        ("attention.top_k=true", "attention.top_k", "int"),
        ("optim.learning_rate=inf", "optim.learning_rate", "finite"),
        ("optim.learning_rate=nan", "optim.learning_rate", "finite"),
        ("run.dir=", "run.dir", "empty"),
        ("data.path=", "data.path", "empty"),
        ("trian.steps=1", "trian.steps", "did you mean train?"),
        ("train.steps.x=1", "train.steps.x", "train.steps is given as a whole"),
        ("recipe.x=1", "recipe.x", "recipe is given as a whole"),
        ("stages.long.steps=3", "stages.long.steps", "stages is given as a whole"),
        ("model=null", "overrides", "must be a string"),
        ("recipe=[1]", "overrides", ""),
        ("checkpoint.init_from_hf=[1]", "checkpoint.init_from_hf", "expects str"),
        ("hydra.run.dir=/tmp/x", "hydra.run.dir", "leave it out"),
        ("hydra/launcher=basic", "hydra/launcher", "leave it out"),
        ("train", "train", "key=value"),
    ],
)
def test_a_wrong_override_names_key_and_remedy(override, key, remedy):
    with pytest.raises(ConfigError) as caught:
        compose([override])
    assert caught.value.key == key
    assert remedy in caught.value.remedy


def test_scientific_notation_is_a_number():
    assert from_dict({"optim": {"learning_rate": "3e-4"}}).optim.learning_rate == 3e-4


def test_a_group_given_as_a_single_value_is_refused():
    with pytest.raises(ConfigError, match="group of keys"):
        from_dict({"model": 3})


class TestCommandLine:
    def test_runs_the_action_with_the_composed_config(self):
        seen: list[RunConfig] = []
        assert run_command_line(lambda config: seen.append(config) or 0, "doc", ["train.steps=3"]) == 0
        assert seen[0].train.steps == 3

    @pytest.mark.parametrize("given", [["--cfg", "job", "recipe=8k"], ["recipe=8k", "--cfg=job"]])
    def test_cfg_job_prints_yaml_and_runs_nothing(self, capsys, given):
        assert run_command_line(pytest.fail, "doc", given) == 0
        assert "sequence_length: 8192" in capsys.readouterr().out

    def test_help_lists_recipes_and_keys(self, capsys):
        assert run_command_line(pytest.fail, "What it does.", ["--help"]) == 0
        text = capsys.readouterr().out
        assert "What it does." in text
        assert "128k" in text
        assert "dense_last_layers" in text

    @pytest.mark.parametrize("rank, said", [("0", "\ninterrupted\n"), ("1", "")])
    def test_ctrl_c_before_training_is_no_traceback(self, capsys, monkeypatch, rank, said):
        def interrupted(config):
            raise KeyboardInterrupt

        monkeypatch.setenv("RANK", rank)
        assert run_command_line(interrupted, "doc", []) == 130
        assert capsys.readouterr().err == said

    @pytest.mark.parametrize("rank, local_rank, waited", [("0", "0", []), ("8", "0", []), ("9", "1", [10.0])])
    def test_an_error_is_one_message_a_machine_and_others_leave_it_the_word(
        self, capsys, monkeypatch, rank, local_rank, waited
    ):
        waits = []
        monkeypatch.setattr("time.sleep", waits.append)
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        assert run_command_line(pytest.fail, "doc", ["foo=1"]) == 2
        assert "foo='1'" in capsys.readouterr().err
        assert waits == waited
