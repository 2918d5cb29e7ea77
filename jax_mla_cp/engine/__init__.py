"""The engine: waiting queue, page pool, prefix cache, scheduler, and the thread that steps the model."""

from jax_mla_cp.batch.step_request import SamplingParams
from jax_mla_cp.engine.engine import Engine, EngineDead, QueueFull
from jax_mla_cp.engine.observer import Observer, PrefillReport, RequestReport, StepReport
from jax_mla_cp.engine.request import Event, Failed, Finished, Grammar, GrammarError, PromptLogprobs, Request, Token
from jax_mla_cp.engine.status import EngineStatus, SpeculationStats
from jax_mla_cp.step.compile_progress import CompileProgress

__all__ = [
    "CompileProgress",
    "Engine",
    "EngineDead",
    "EngineStatus",
    "Event",
    "Failed",
    "Finished",
    "Grammar",
    "GrammarError",
    "Observer",
    "PrefillReport",
    "PromptLogprobs",
    "QueueFull",
    "Request",
    "RequestReport",
    "SamplingParams",
    "SpeculationStats",
    "StepReport",
    "Token",
]
