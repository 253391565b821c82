"""Engines that run independent tasks; each is a module with one function `run`."""
