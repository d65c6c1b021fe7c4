"""Folders of tiny models, with weights and without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from qcompiler.ir.graph import Graph

Saved = Callable[[Graph], Path]
"""`saved(graph)`: a folder with the config and random weights of a graph's model."""


@pytest.fixture
def described(tmp_path: Path) -> Callable[[Graph], Path]:
    """`described(graph)`: a folder with the config of a graph's model, and nothing else."""

    def describe(graph: Graph) -> Path:
        graph.model.config.save_pretrained(tmp_path / "described")
        return tmp_path / "described"

    return describe


@pytest.fixture
def saved(tmp_path: Path) -> Saved:
    """A folder with the config and random weights of a graph's model."""

    def save(graph: Graph) -> Path:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(graph.model.config, dtype=graph.model.dtype)
        model.save_pretrained(tmp_path / "saved")
        return tmp_path / "saved"

    return save
