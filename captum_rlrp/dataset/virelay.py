"""The files by which ViRelAy opens a run: names of the labels, and a project."""

from __future__ import annotations

import json
from pathlib import Path

from .store import Run, hdf5, write_file


def write_project(out: Path, run: Run) -> None:
    """Write ``label_map.json`` and, if the inputs were kept, ``project.yaml``."""
    h5py = hdf5()
    with h5py.File(out / "attribution.h5", "r") as file:
        if "prediction" not in file:
            return
        count = file["prediction"].shape[1]
    names = run.about.get("class_names") or []
    labels = [
        {
            "index": i,
            "word_net_id": f"{i:08d}",
            "name": names[i] if i < len(names) else f"class {i}",
        }
        for i in range(count)
    ]
    content = json.dumps(labels, indent=1, ensure_ascii=False) + "\n"
    write_file(out / "label_map.json", content.encode())
    with h5py.File(out / "data.h5", "r") as file:
        shape: tuple[int, ...] = file["data"].shape if "data" in file else ()
    if len(shape) != 4:
        return
    _, _, height, width = shape
    first = run.depends["targets"][0]
    strategy = {"label": "true_label", "predicted": "predicted_label"}.get(first, str(first))
    project = f"""\
project:
  name: {json.dumps(str(run.about.get("data", out.resolve().name)))}
  model: {json.dumps(str(run.about.get("model_name", run.depends["model"])))}
  label_map: label_map.json
  dataset:
    name: {json.dumps(str(run.about.get("data", "data")))}
    type: hdf5
    path: data.h5
    input_width: {width}
    input_height: {height}
    down_sampling_method: none
    up_sampling_method: none
  attributions:
    attribution_method: Relative LRP
    attribution_strategy: {json.dumps(strategy)}
    sources:
      - attribution.h5
  analyses: []
"""
    write_file(out / "project.yaml", project.encode())
