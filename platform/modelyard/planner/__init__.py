"""The planner: parameters, memory, time, cost and energy before any is spent. No torch, no Ray."""
