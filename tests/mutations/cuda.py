"""Mutations of the CUDA kernels, their launches, and the memory that they need."""

from __future__ import annotations

from tests.mutations.mutation import Mutation

MUTATIONS: tuple[Mutation, ...] = ()
