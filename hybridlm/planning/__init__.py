"""Plans of a whole run, from its config alone: nothing is built and no process is started.

    layout_checks     whether experts, rows and batches divide among processes
    process_count     how many processes `hybridlm train` starts
    rank_memory       memory of one process
    communication     bytes that processes send one another in a training step
"""
