"""The parts of utils.plotting, one job a module. Lectures import utils.plotting, never these."""
