"""Drafters: interchangeable providers of proposals."""

from specflow.drafters.llm import LLMDrafter as LLMDrafter
