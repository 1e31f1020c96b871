"""Invalid settings on the command line: one line, exit code 2, nothing written."""

import pytest
import tiny_run

import afa
from afa.errors import EXIT_USER_ERROR, UserError


@pytest.fixture
def refused(tiny_data, tmp_path, capsys, monkeypatch):
    """Returns a function that checks the error line of a tiny run."""
    monkeypatch.chdir(tmp_path)

    def check(line, **changes):
        before = tiny_run.listing(tmp_path)
        code = tiny_run.main(*tiny_run.words(tiny_data, tmp_path / "run", **changes))
        assert capsys.readouterr().err == f"error: {line}\n"
        assert code == EXIT_USER_ERROR
        assert tiny_run.listing(tmp_path) == before

    return check


@pytest.mark.parametrize(
    ("field", "value", "line"),
    [
        ("train.steps", "0", "train.steps='0' gives 0 steps (allowed: at least 1)"),
        ("train.steps", "0.4", "train.steps='0.4' gives 0 steps (allowed: at least 1)"),
        ("train.steps", "40%",
         "train.steps='40%' must not be a percentage (allowed: \"500\", \"20ep\")"),
        ("train.generator_steps", "0",
         "train.generator_steps='0' gives 0 steps (allowed: at least 1)"),
        ("optim.warmup", "200%", "optim.warmup='200%' must be at most 100%"),
        ("optim.warmup", "9", "optim.warmup='9' is 9 steps, more than the 8 of F"),
        ("optim.warmup", "5", "optim.warmup='5' is 5 steps, more than the 4 of G and D"),
        ("optim.head_warmup", "9",
         "optim.head_warmup='9' is 9 steps, more than the 8 of F"),
        ("optim.accumulate", 1000,
         "optim.accumulate=1000 is more than the 8 steps of F: no parameter would be updated"),
        ("optim.learning_rate", "inf", "optim.learning_rate=inf must be finite"),
        ("seed", -1, "seed=-1 must lie in [0, 4294967295]"),
        ("data.split_seed", -1, "data.split_seed=-1 must lie in [0, 4294967295]"),
        ("loss.margin", 0.3,
         "--loss.margin is not a field of loss.name='norm_softmax'; did you mean 'loss.name'? "
         "(allowed: loss.name, loss.local_weight, loss.fused_weight, loss.temperature)"),
    ],
)  # fmt: skip
def test_invalid_field(field, value, line, refused):
    refused(line, **{field: value})


def test_invalid_combinations_of_fields(refused):
    refused("loss.margin=nan must be finite", **{"loss.name": "arcface", "loss.margin": "nan"})
    refused(
        "adversarial.generated_views=0.5 needs a generator (adversarial.enabled=True and "
        "adversarial.generator=True)",
        **{"adversarial.generated_views": 0.5, "train.schedule": "joint",
           "adversarial.generator": False, "generator.latent_dim": None,
           "train.generator_steps": None},
    )  # fmt: skip
    refused(
        "generator.latent_dim=5 has no effect with adversarial.generator=False",
        **{"adversarial.generator": False},
    )
    with pytest.raises(UserError, match=r"generator\.width=3 has no effect with adversarial\.e"):
        afa.run("debug", **{"adversarial.enabled": False, "generator.width": 3})
