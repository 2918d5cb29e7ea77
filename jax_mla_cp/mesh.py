"""The mesh: "tp=8,cp=4" to devices, the axis names (here and nowhere else), and per-axis collectives.

Axes are ("dp", "cp", "tp"): dp divides the requests, cp the tokens of a step, tp the heads, the dense MLP and the
vocabulary. tp is the fastest axis, so that neighboring devices (one node's NVLink) share it.

The model's code runs per device. It calls the collectives through `Axes`, which does nothing without a mesh, so that
the same code runs under plain `jax.jit`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jax_mla_cp.config.errors import ConfigError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T")
D = TypeVar("D", bound="DataclassInstance")

DP, CP, TP = "dp", "cp", "tp"
AXES = (DP, CP, TP)
TOKENS = (DP, CP)
"""The axes that divide the tokens of a step."""


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """Sizes of the axes that divide requests (dp), tokens (cp) and heads (tp)."""

    dp: int = 1
    cp: int = 1
    tp: int = 1

    @property
    def devices(self) -> int:
        return self.dp * self.cp * self.tp

    def __str__(self) -> str:
        return ",".join(f"{axis}={getattr(self, axis)}" for axis in reversed(AXES) if axis != DP or self.dp > 1)

    @classmethod
    def parse(cls, text: str) -> MeshShape:
        """Reads "tp=8,cp=4[,dp=2]", in any order; an axis that is missing is 1.

        >>> MeshShape.parse("tp=8,cp=4")
        MeshShape(dp=1, cp=4, tp=8)

        Raises:
          ConfigError: an unknown or repeated axis, or a size that is not a positive whole number.
        """
        sizes: dict[str, int] = {}
        for part in text.split(","):
            axis, equals, size = part.strip().partition("=")
            if axis not in AXES or not equals:
                raise ConfigError(
                    "mesh",
                    f"{part.strip()!r} is not AXIS=SIZE with AXIS one of tp, cp, dp, got {text!r}. Use e.g. mesh='tp=8,cp=4'.",
                )
            if axis in sizes:
                raise ConfigError("mesh", f"{axis} is given twice in {text!r}. Give each axis once.")
            if not (size.isascii() and size.isdigit() and 1 <= int(size) <= 65536):
                raise ConfigError("mesh", f"{axis} must be a whole number from 1 to 65536, got {size!r} in {text!r}.")
            sizes[axis] = int(size)
        return cls(**sizes)


def make_mesh(shape: str | MeshShape, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with axes ("dp", "cp", "tp") over `devices` (default: all of them, and then exactly as many as needed).

    Raises:
      ConfigError: there are more or fewer devices than the mesh needs.
    """
    shape = MeshShape.parse(shape) if isinstance(shape, str) else shape
    devices = list(jax.devices() if devices is None else devices)
    if len(devices) < shape.devices:
        sizes = [f"{axis}={size}" for axis in AXES if (size := getattr(shape, axis)) > 1]
        raise ConfigError(
            "mesh",
            f"{' and '.join(sizes)} need{'s' if len(sizes) == 1 else ''} {shape.devices} devices, found {len(devices)} "
            f"({devices[0].device_kind}). Use mesh={_smaller(shape, len(devices))!r}{_cpu_hint(devices, shape)}.",
        )
    if len(devices) > shape.devices and jax.process_count() > 1:
        raise ConfigError(
            "mesh",
            f"{shape} uses {shape.devices} of {len(devices)} devices; several processes must use all of theirs. "
            "Use a mesh of all devices.",
        )
    return jax.make_mesh(
        (shape.dp, shape.cp, shape.tp), AXES, devices=devices[: shape.devices], axis_types=(AxisType.Auto,) * len(AXES)
    )


def _smaller(shape: MeshShape, devices: int) -> str:
    """A mesh that fits `devices`: each axis cut to a divisor, tp last, because it divides the weights."""
    sizes = {}
    for axis in reversed(AXES):
        size = getattr(shape, axis)
        sizes[axis] = max(d for d in range(1, size + 1) if size % d == 0 and d <= devices)
        devices //= sizes[axis]
    return ",".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1) or "tp=1"


def _cpu_hint(devices: list[jax.Device], shape: MeshShape) -> str:
    if devices[0].platform != "cpu":
        return ""
    return f', or call jax.config.update("jax_num_cpu_devices", {shape.devices}) before the first use of JAX'


def mesh_shape(mesh: Mesh | None) -> MeshShape:
    """The sizes of a mesh made by `make_mesh`; all 1 without a mesh.

    Raises:
      ConfigError: a mesh with other axes.
    """
    if mesh is None:
        return MeshShape()
    if set(mesh.axis_names) != set(AXES):
        raise ConfigError("mesh", f"axes must be {AXES}, got {mesh.axis_names}. Use jax_mla_cp.make_mesh.")
    return MeshShape(**{axis: mesh.shape[axis] for axis in AXES})


@dataclasses.dataclass(frozen=True)
class Axes:
    """Collectives over named axes for code that runs per device; without a mesh each is the identity.

    With `shard_map(check_vma=True)` every array's type says over which axes it differs between devices, and JAX
    refuses a program whose result is not as replicated as it claims. The methods keep those types exact.
    """

    shape: MeshShape | None = None

    def size(self, axes: str | tuple[str, ...]) -> int:
        """Number of devices along `axes`."""
        size = 1
        for axis in (axes,) if isinstance(axes, str) else axes:
            size *= getattr(self.shape, axis) if self.shape else 1
        return size

    def index(self, axes: str | tuple[str, ...]) -> jax.Array | int:
        """This device's number along `axes`, the last of them fastest; 0 along none."""
        return lax.axis_index(axes) if self.shape and axes else 0

    def psum(self, x: jax.Array, axes: str | tuple[str, ...]) -> jax.Array:
        """Sum over `axes`; the result is the same on all of them."""
        return lax.psum(x, axes) if self.shape else x

    def all_gather(self, x: jax.Array, axes: str | tuple[str, ...], *, dim: int = 0) -> jax.Array:
        """Concatenates the devices' `x` along `dim`; the result is the same on all of them (and typed so)."""
        return lax.all_gather(x, axes, axis=dim, tiled=True, to="invarying") if self.shape else x

    def psum_scatter(self, x: jax.Array, axes: str | tuple[str, ...]) -> jax.Array:
        """Sum over `axes`, of which every device keeps its part of dimension 0."""
        return lax.psum_scatter(x, axes, scatter_dimension=0, tiled=True) if self.shape else x


def vary_like(x: T, *like: Any) -> T:
    """`x`, an array or a pytree of them, typed as differing between devices wherever one of the pytrees `like` does.

    For a loop's first carry, and for results of calls whose operands JAX does not look at.
    """
    want: set[str] = set()
    for leaf in jax.tree.leaves(like):
        want |= jax.typeof(leaf).manual_axis_type.varying

    def cast(leaf: jax.Array) -> jax.Array:
        missing = tuple(sorted(want - jax.typeof(leaf).manual_axis_type.varying))
        return lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(cast, x)


def declared_specs(x: D) -> D:
    """The PartitionSpec of each array of a dataclass, as its fields declare them in their metadata ("spec").

    A field's spec is that of all arrays in it; a field that is None stays None.

    Raises:
      KeyError: a field that is not static declares none.
    """
    fields = [field for field in dataclasses.fields(x) if not field.metadata.get("static")]
    specs = {f.name: jax.tree.map(lambda _, spec=f.metadata["spec"]: spec, getattr(x, f.name)) for f in fields}
    return dataclasses.replace(x, **specs)


def spec_axes(spec: PartitionSpec) -> set[str]:
    """The mesh axes that a PartitionSpec names."""
    axes: set[str] = set()
    for entry in spec:
        axes |= {entry} if isinstance(entry, str) else set(entry or ())
    return axes


def on_devices(arrays: T, specs: Any, mesh: Mesh | None) -> T:
    """Host arrays (a pytree) onto this process's devices of the mesh, or the default one, divided as `specs` tell."""
    if mesh is None:
        return jax.device_put(arrays)
    shardings = jax.tree.map(functools.partial(NamedSharding, mesh), specs)
    if not mesh.is_multi_process:
        return jax.device_put(arrays, shardings)

    def place(x: np.ndarray, sharding: NamedSharding) -> jax.Array:
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(place, arrays, shardings)
