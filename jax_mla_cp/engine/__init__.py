"""Requests over time: pages, schedule, and the loop that steps the model."""

from jax_mla_cp.batch.step_request import SamplingParams
from jax_mla_cp.engine.engine import Engine, EngineDead, QueueFull
from jax_mla_cp.engine.observer import Observer, Prefilled, RequestReport, StepReport
from jax_mla_cp.engine.request import Event, Failed, Finished, Grammar, GrammarError, PromptLogprobs, Request, Token
from jax_mla_cp.engine.status import EngineStatus, Speculation

__all__ = [
    "Engine",
    "EngineDead",
    "EngineStatus",
    "Event",
    "Failed",
    "Finished",
    "Grammar",
    "GrammarError",
    "Observer",
    "Prefilled",
    "PromptLogprobs",
    "QueueFull",
    "Request",
    "RequestReport",
    "SamplingParams",
    "Speculation",
    "StepReport",
    "Token",
]
