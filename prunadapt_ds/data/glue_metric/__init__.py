"""The metric script, a folder of its own because `evaluate.load` wants one."""
