"""`LeadingRunner`: process 0's runner, whose steps all processes execute."""

from __future__ import annotations

from collections.abc import Sequence

from jax_mla_cp.batch.step_request import StepRequest
from jax_mla_cp.distributed.leader import ClusterFailed, Leader
from jax_mla_cp.distributed.step_message import StepMessage
from jax_mla_cp.step.compile_progress import CompileProgress
from jax_mla_cp.step.results import RunnerOutput, read_results
from jax_mla_cp.step.runner import Runner


class LeadingRunner:
    """A runner of which every step that it executes is executed by all processes. Implements `jax_mla_cp.engine.step_runner.StepRunner`."""

    def __init__(self, runner: Runner, leader: Leader):
        self._runner, self._leader = runner, leader
        self.prefill_chunk, self.max_running = runner.prefill_chunk, runner.max_running

    @property
    def dp(self) -> int:
        return self._runner.dp

    @property
    def draft_tokens(self) -> int:
        return self._runner.draft_tokens

    @property
    def page_size(self) -> int:
        return self._runner.page_size

    @property
    def pages_per_group(self) -> int:
        return self._runner.pages_per_group

    @property
    def compiling(self) -> CompileProgress | None:
        return self._runner.compiling

    def check(self, request: StepRequest) -> None:
        self._runner.check(request)

    def step(self, groups: Sequence[Sequence[StepRequest]]) -> RunnerOutput:
        """As `Runner.step`, in all processes.

        Raises:
          ValueError: as `Runner.step`; nothing has been sent then.
          ClusterFailed: the step failed in a process, and the cluster ends.
        """
        runner = self._runner
        layout, inputs = runner.prepare(groups)
        if first_run := not runner.is_compiled(inputs.shape):
            self._leader.announce(inputs.shape)
        program = runner.fingerprint(inputs.shape)
        with self._leader.step(lambda number: StepMessage(number, program, inputs), first_run=first_run):
            output = runner.execute(inputs)
        return read_results(output, layout, runner.planner.shape)

    def reset(self) -> None:
        """Never needed: a step that fails ends the cluster, whose processes are in its collectives."""
        raise ClusterFailed("the cache of several processes can't be replaced.")
