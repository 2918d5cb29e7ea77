"""Requests over time: pages, schedule, and the loop that steps the model."""

from jax_mla_cp.engine.engine import Engine, EngineDead, Speculation
from jax_mla_cp.engine.request import Event, Failed, Finished, Request, Token

__all__ = ["Engine", "EngineDead", "Event", "Failed", "Finished", "Request", "Speculation", "Token"]
