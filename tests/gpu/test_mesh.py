"""Several GPUs, through NCCL and FlashAttention-3, against one of them: the same weights and requests."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_mla_cp.mesh import MeshShape
from jax_mla_cp.step.runner import compile_step
from tests.helpers.synthetic import REAL_DIMS_CONFIG, Driver, random_model, tempered
from tests.test_cache import copies_of

PROMPTS = [
    np.random.default_rng(i).integers(0, REAL_DIMS_CONFIG.vocab_size, n).tolist() for i, n in enumerate((300, 9, 64))
]
STEPS = 8
MESHES = [("cp=2", "tp"), ("cp=2", "tp,cp"), ("tp=2", "tp"), ("dp=2", "tp"), ("tp=2,cp=2", "tp,cp")]


def driver(mesh: str | None, ep: str = "tp", form: str = "auto") -> Driver:
    if mesh and MeshShape.parse(mesh).devices > jax.device_count():
        pytest.skip(f"{mesh} needs {MeshShape.parse(mesh).devices} GPUs, there are {jax.device_count()}")
    model = random_model(mesh, ep, config=REAL_DIMS_CONFIG, dtype=jnp.dtype(jnp.bfloat16), attention="fa3")
    return Driver(tempered(model), form=form, page_size=64, max_requests=5, max_model_len=448, spare=21, chunk=512)


def decode(driver: Driver, prompts: list[list[int]], chosen: np.ndarray | None = None) -> np.ndarray:
    """Logits [steps, prompts, vocab] of a prefill and decode steps, greedy or with the tokens of `chosen`, such logits."""
    dp = driver.planner.shape.dp
    requests = [driver.request(group=i % dp) for i in range(len(prompts))]
    logits, news = [], prompts
    for step in range(STEPS):
        logits.append(driver.step(list(zip(requests, news, strict=True))))
        best = (logits if chosen is None else chosen)[step].argmax(-1)
        news = [[int(token)] for token in best]
    return np.stack(logits)


def errors(got: np.ndarray, want: np.ndarray) -> np.ndarray:
    """Relative, of each step's logits of each prompt."""
    return np.linalg.norm(got - want, axis=-1) / np.linalg.norm(want, axis=-1)


@pytest.mark.parametrize("form", ["expanded", "absorbed"])
@pytest.mark.parametrize(("mesh", "ep"), MESHES)
def test_a_mesh_gives_the_logits_of_one_gpu(mesh: str, ep: str, form: str) -> None:
    on = driver(mesh, ep, form)
    want = decode(driver(None, form=form), PROMPTS)
    got = decode(on, PROMPTS, want)
    error = errors(got, want)
    print(f"{mesh}, experts over {ep}, {form}: error median {np.median(error):.4f}, largest {error.max():.4f}")
    assert np.median(error) < 1e-2
    assert (error > 2e-2).mean() < 0.1, "few are rerouted to other experts by a rounding"
    # Another token in the middle of the longest prompt would be seen.
    changed = [list(prompt) for prompt in PROMPTS]
    changed[0][150] = (changed[0][150] + 1) % REAL_DIMS_CONFIG.vocab_size
    assert np.median(errors(decode(on, changed, want)[:, 0], want[:, 0])) > 2e-2


def test_the_step_gathers_latents_and_copies_no_cache() -> None:
    on = driver("cp=2")
    step = next(s for s in reversed(on.planner.step_shapes) if s.expanded_keys)
    text = compile_step(on.planner, step).as_text()
    latents = f",{REAL_DIMS_CONFIG.latent_dim}]"
    assert any("all-gather" in line and latents in line for line in text.splitlines())
    assert not copies_of(text, on.pages.shape)
