"""The weights of a Hugging Face folder: safetensors files, in and out.

    *.safetensors   a header in JSON (name, dtype, shape and place of each tensor), then the bytes;
                    large models have several such files, and an index of them

We read all headers first. Whatever is missing, left over or of another shape is named before any
memory is taken. Weights stored as pickle are refused, because reading a pickle can run code.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from support.files import read_json, write_json

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
INDEX = "model.safetensors.index.json"
Stored = tuple[Path, torch.dtype]  # the file that holds a tensor, and its dtype there


def check_weights(folder: Path, parameters: dict[str, Tensor]) -> dict[str, Stored]:
    """Find each parameter's file and its dtype there, reading the headers alone.

    Raises ValueError for a tensor that is missing, left over, there twice, or of another shape.
    """
    from safetensors import SafetensorError, safe_open

    found: dict[str, Stored] = {}
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                headers = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is not a whole safetensors file: {error}") from None
        for key, header in headers.items():
            if key not in parameters:
                if key.endswith(("rotary_emb.inv_freq", "lm_head.weight")):
                    continue  # older writers store what config.json says, and a tied table twice
                raise ValueError(f"{path} holds {key!r}, which this config.json does not have")
            shape, expected = tuple(header.get_shape()), tuple(parameters[key].shape)
            if shape != expected:
                raise ValueError(f"{path}: {key!r} is {shape}, config.json says {expected}")
            if header.get_dtype() not in DTYPES:
                raise ValueError(f"{path}: {key!r} is {header.get_dtype()}, not one of "
                                 f"{', '.join(DTYPES)}")
            if key in found:
                raise ValueError(f"{key!r} is in both {found[key][0]} and {path}")
            found[key] = path, DTYPES[header.get_dtype()]
    missing = parameters.keys() - found.keys()
    if missing:
        raise ValueError(f"{folder} lacks {len(missing)} tensors, the first is {min(missing)!r}")
    return found


def weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or the files that the index names (which must lie in the folder)."""
    index, single = folder / INDEX, folder / "model.safetensors"
    if not index.exists():
        pickles = [path.name for path in folder.glob("*") if path.suffix in (".bin", ".pt", ".pth")]
        if pickles and not single.exists():
            raise ValueError(f"{folder} holds weights as pickle alone ({min(pickles)}), which can "
                             "run code when read; get or make the model's safetensors")
        return [single]
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index} is not a readable index: it has no weight_map")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".."):
            raise ValueError(f"{index} names {name!r}, which is not a file of this folder")
    return [folder / name for name in sorted(set(weight_map.values()))]


def load_tensors(folder: Path, parameters: dict[str, Tensor]) -> None:
    """Fill the parameters, under FSDP this rank's rows of each, from the folder's files."""
    from safetensors import safe_open

    for key, (path, _) in check_weights(folder, parameters).items():
        mine, rows = local_rows(parameters[key])
        # The mapped pages of an open file count as our memory, so we open it for each tensor anew.
        with safe_open(path, framework="pt") as file, torch.no_grad():
            mine.copy_(file.get_slice(key)[rows])


def local_rows(weight: Tensor) -> tuple[Tensor, slice]:
    """This rank's part of a weight, and its rows: FSDP2 gives ceil(n / ranks) rows to each rank."""
    if not isinstance(weight, DTensor):
        return weight, slice(0, weight.shape[0])
    mine, share = weight.to_local(), -(-weight.shape[0] // weight.device_mesh.size())
    begin = min(share * weight.device_mesh.get_local_rank(), weight.shape[0])
    return mine, slice(begin, begin + mine.shape[0])


def write_tensors(folder: Path, parameters: dict[str, Tensor], main: bool,
                  shard_bytes: int) -> None:
    """Write all parameters: about `shard_bytes` to a file, and an index if there are several.

    Under FSDP every rank must call it, because gathering a tensor is a collective; only `main`
    writes. We gather no more than one file's tensors at a time.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    shards: dict[int, list[str]] = {}
    total = 0
    for key, weight in parameters.items():
        shards.setdefault(total // shard_bytes, []).append(key)
        total += weight.nbytes
    failure: Exception | None = None
    weight_map = {}
    for i, keys in enumerate(shards.values(), start=1):
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        name = "model.safetensors" if len(shards) == 1 else name
        tensors = {}
        for key in keys:
            weight = parameters[key].detach()
            whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
            if main:
                tensors[key] = whole.cpu().contiguous()
            weight_map[key] = name
        try:
            if main and failure is None:
                save_file(tensors, folder / name, metadata={"format": "pt"})
        except (OSError, SafetensorError) as error:
            failure = error  # the other ranks still wait for this one in the next gather
    if failure:
        raise failure
    if main and len(shards) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
