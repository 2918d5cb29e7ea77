"""The body of GET /status. Times are in seconds."""

from __future__ import annotations

from pydantic import BaseModel, Field


class Model(BaseModel):
    name: str
    max_model_len: int = Field(description="Maximum context length: prompt and output tokens.")
    chat: bool = Field(description="The model has a chat template.")
    facts: dict[str, str] = Field(description="Versions, device, dtype, attention kernel, ...")


class MeshSize(BaseModel):
    dp: int
    cp: int
    tp: int


class Compiling(BaseModel):
    """The program that is being compiled. Requests wait for it."""

    done: int = Field(description="Programs compiled so far.")
    total: int = Field(description="Programs of this server, one for each step size.")
    tokens: int = Field(description="Tokens per step and dp group of the program that is being compiled.")
    seconds: float = Field(description="Seconds since its compilation began.")


class Chunk(BaseModel):
    """Tokens [start, end) of a prompt on one cp rank. The rank is null for a chunk too short to be split: it is computed
    whole, on the rank with the fewest tokens."""

    rank: int | None
    start: int
    end: int


class PromptStep(BaseModel):
    start: int = Field(description="Prompt tokens computed or reused before this step.")
    chunks: list[Chunk]


class Prompt(BaseModel):
    """A prompt that has been prefilled, completely or in part."""

    id: str
    total: int = Field(description="Tokens of the prompt.")
    done: int = Field(description="Tokens computed or reused so far.")
    reused: int = Field(description="Tokens found in the prefix cache.")
    active: bool = Field(description="The prompt was part of the last prefill step.")
    steps: list[PromptStep] = Field(description="The prompt's latest steps.")


class Prefill(BaseModel):
    """The last step that computed prompt tokens."""

    age: float = Field(description="Seconds since the step.")
    seconds: float = Field(description="Duration of the step.")
    tokens: list[int] = Field(description="Tokens per cp rank, over all requests of the step.")
    pairs: list[int] = Field(description="Query-key pairs per cp rank, which determine the cost of attention.")
    balance: float = Field(description="Mean divided by maximum of the pairs; 1 is perfect balance.")
    prompts: list[Prompt]


class Pages(BaseModel):
    total: int
    used: int = Field(description="Pages of running requests.")
    cached: int = Field(description="Pages of finished requests, reusable until they are evicted.")
    free: int


class Percentiles(BaseModel):
    p50: float
    p99: float


class Latency(BaseModel):
    """Latencies of the last two minutes."""

    summary: Percentiles | None = None
    series: list[tuple[int, float, float]] = Field(description="[seconds ago, median, 99th percentile]")


class Speculation(BaseModel):
    """Draft tokens since the start."""

    drafted: int
    accepted: int


class Process(BaseModel):
    """One of several processes that share the mesh. Process 0 is this server."""

    process: int
    host: str
    heartbeat_age: float = Field(description="Seconds since its last message; 0 for process 0.")
    step: int = Field(description="Its last step; 0 before the first.")
    step_seconds: float = Field(description="Duration of that step.")


class Status(BaseModel):
    healthy: bool
    reason: str | None = Field(default=None, description="Why the server is not healthy.")
    uptime: float
    compiling: Compiling | None = Field(default=None, description="null if no program is being compiled.")
    model: Model
    mesh: MeshSize
    processes: list[Process] | None = Field(default=None, description="null if this process has the mesh alone.")
    running: int = Field(description="Running requests.")
    waiting: int = Field(description="Requests in the waiting queue.")
    steps: int
    preemptions: int
    pages: Pages
    prefix_queries: int = Field(description="Prompt tokens looked up in the prefix cache.")
    prefix_hits: int = Field(description="Prompt tokens found in the prefix cache.")
    speculation: Speculation | None = Field(default=None, description="null without speculative decoding.")
    prefill: Prefill | None = None
    ttft: Latency = Field(description="Time to first token.")
    itl: Latency = Field(description="Inter-token latency.")
    step_time: Latency
    prompt_rate: list[tuple[int, int]] = Field(description="[seconds ago, prompt tokens computed in that second]")
    token_rate: list[tuple[int, int]] = Field(description="[seconds ago, tokens generated in that second]")
