"""Headless Chromium, a server with the built-in model behind an API key, and one whose model means harm."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from selenium import webdriver
from selenium.webdriver.remote.webdriver import WebDriver

from jax_mla_cp.batch.step_request import StepRequest
from jax_mla_cp.engine import Engine
from jax_mla_cp.mesh import MeshShape
from jax_mla_cp.serve.served_model import ServedModel
from jax_mla_cp.serve.status import Telemetry
from jax_mla_cp.serve.status.server_info import ServerInfo
from jax_mla_cp.step.results import RunnerOutput, SampledToken, StepResult
from tests.helpers.byte_tokenizer import byte_tokenizer
from tests.helpers.in_process import serving
from tests.helpers.processes import server, url_of
from tests.helpers.standin import PageModel

KEY = "the-key-of-the-browser-tests"
HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script><b>bold</b> "


@pytest.fixture(scope="session")
def browser() -> Iterator[WebDriver]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("no chromium and chromedriver on the PATH; on Debian: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    # Without a sandbox because tests run as root in containers, which Chromium's refuses.
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--disable-gpu",
        "--window-size=1280,1600",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    made = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield made
    made.quit()


@pytest.fixture(scope="session")
def guarded_url(browser: WebDriver) -> Iterator[str]:
    """The built-in model on 8 virtual devices; KEY is its key. After `browser`, so that nothing starts without one."""
    flags = ("--mesh", "tp=2,cp=4", "--prefill-chunk", "128", "--max-model-len", "3072", "--max-running", "4")
    with server(*flags, JAX_MLA_CP_API_KEY=KEY) as process:
        yield url_of(process)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and "Traceback" not in errors


class HostileModel(PageModel):
    """Says `HOSTILE`, over and over, a byte a token, slowly enough to be stopped."""

    def step(self, work: Sequence[Sequence[StepRequest]]) -> RunnerOutput:
        time.sleep(0.005)
        return self.output(work, [[self._say(w) for w in works] for works in work])

    def _say(self, work: StepRequest) -> StepResult:
        if work.sampling is None:
            return StepResult([], [])
        byte = HOSTILE.encode()[(work.num_computed_tokens + len(work.tokens)) % len(HOSTILE)]
        return StepResult([SampledToken(byte, -0.5, np.zeros(0, np.int32), np.zeros(0, np.float32))], [])


@pytest.fixture(scope="session")
def hostile_model() -> HostileModel:
    return HostileModel(pages=200, cp=3)


@pytest.fixture(scope="session")
def hostile_url(browser: WebDriver, hostile_model: HostileModel) -> Iterator[str]:
    telemetry = Telemetry(ServerInfo("<i>tiny</i>", 600, False, MeshShape(dp=2, cp=3, tp=2), {"version": "<u>0</u>"}))
    engine = Engine(hostile_model, observer=telemetry)
    served = ServedModel("<i>tiny</i>", engine, byte_tokenizer(), 259, 600, (), None)
    with serving(served, telemetry) as url:
        yield url
