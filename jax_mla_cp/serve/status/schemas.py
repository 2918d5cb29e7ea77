"""GET /status: what the page shows, for whoever wants it as JSON. Times are in seconds."""

from __future__ import annotations

from pydantic import BaseModel, Field


class Model(BaseModel):
    name: str
    max_model_len: int
    chat: bool = Field(description="the model has a chat template")
    facts: dict[str, str] = Field(description="what runs: versions, device, dtype, attention")


class MeshSize(BaseModel):
    dp: int
    cp: int
    tp: int


class Chunk(BaseModel):
    """Tokens [start, end) of a prompt on one cp rank; the rank is null for a piece too short to be cut, which is whole on
    the rank with the fewest tokens."""

    rank: int | None
    start: int
    end: int


class PromptStep(BaseModel):
    start: int = Field(description="tokens before the step's")
    chunks: list[Chunk]


class Prompt(BaseModel):
    """A prompt that has been prefilled, or a part of it."""

    id: str
    total: int
    done: int
    reused: int = Field(description="tokens of it that were in the cache")
    active: bool = Field(description="part of the last prefill step")
    steps: list[PromptStep] = Field(description="the last ones")


class Prefill(BaseModel):
    """The last step that computed prompt tokens."""

    age: float
    seconds: float
    tokens: list[int] = Field(description="per cp rank, of all requests in the step")
    pairs: list[int] = Field(description="query-key pairs per cp rank, what attention costs")
    balance: float = Field(description="mean over maximum of the pairs")
    prompts: list[Prompt]


class Pages(BaseModel):
    total: int
    used: int
    cached: int = Field(description="of finished requests, reusable until the room is needed")
    free: int


class Percentiles(BaseModel):
    p50: float
    p99: float


class Latency(BaseModel):
    """The last two minutes."""

    summary: Percentiles | None = None
    series: list[tuple[int, float, float]] = Field(description="[seconds ago, median, 99th percentile]")


class Speculation(BaseModel):
    drafted: int
    accepted: int


class Status(BaseModel):
    healthy: bool
    reason: str | None = Field(default=None, description="why not, if not healthy")
    uptime: float
    model: Model
    mesh: MeshSize
    running: int
    waiting: int
    steps: int
    preemptions: int
    pages: Pages
    prefix_queries: int = Field(description="prompt tokens looked up in the cache")
    prefix_hits: int = Field(description="of these, found")
    speculation: Speculation | None = None
    prefill: Prefill | None = None
    ttft: Latency
    itl: Latency
    step_time: Latency
    prompt_rate: list[tuple[int, int]] = Field(description="[seconds ago, prompt tokens computed in that second]")
    token_rate: list[tuple[int, int]] = Field(description="[seconds ago, tokens sampled in that second]")
