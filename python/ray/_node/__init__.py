"""Node manager: leases, workers, segments, logs of one machine.

The decisions are machines without input or output (`leases`, `workers`, `segments`, `processes`, joined by
`manager`); `shell` performs their effects. `zygote` is the fork server. `launch` is the driver's side.
"""
