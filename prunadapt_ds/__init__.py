"""Adapt a frozen backbone to a task while pruning what the task does not need."""
