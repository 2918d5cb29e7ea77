"""`LeadingRunner`: process 0's runner, whose steps all processes execute."""

from __future__ import annotations

from collections.abc import Sequence

from jax_mla_cp.batch.shapes import StepShape
from jax_mla_cp.batch.step_request import StepRequest
from jax_mla_cp.distributed.leader import ClusterFailed, Leader
from jax_mla_cp.distributed.step_message import StepMessage
from jax_mla_cp.step.compile_progress import CompileProgress
from jax_mla_cp.step.results import RunnerOutput, read_results
from jax_mla_cp.step.runner import Runner, check_table
from jax_mla_cp.step.synchronous_runner import SynchronousRunner


class LeadingRunner(SynchronousRunner):
    """Runs each step in all processes. Implements `jax_mla_cp.engine.step_runner.StepRunner`."""

    def __init__(self, runner: Runner, leader: Leader):
        self._runner, self._leader = runner, leader
        self._ran: set[StepShape] = set()
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

        def message(number: int) -> StepMessage:
            if not runner.is_compiled(inputs.shape):
                self._leader.announce(inputs.shape)
            return StepMessage(number, runner.fingerprint(inputs.shape), inputs)

        # Also without a compilation: NCCL connects at the first run.
        with self._leader.step(message, first_run=inputs.shape not in self._ran):
            arrays = runner.execute(inputs)
            check_table(arrays, inputs.table_checksum)
            output = read_results(arrays, layout, runner.planner.shape)
        self._ran.add(inputs.shape)
        return output

    def reset(self) -> None:
        """Never needed: a step that fails ends the cluster, whose processes are in its collectives."""
        raise ClusterFailed("the cache of several processes can't be replaced.")
