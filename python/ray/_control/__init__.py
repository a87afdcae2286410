"""Control service: what must outlive processes (actors, jobs, keys), as state machines without input or output.

Boundary: nothing here imports `ray._node`; whoever hosts the service feeds events in and performs effects.
"""
