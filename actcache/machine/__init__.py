"""The machine that this process runs on: what it may take of it, and what it must not change there.

In come the limits that the system sets, cores, memory, threads, and paths.
Out go numbers that estimates and plans keep to, a fence around calls into libraries, and files behind no link.
Nothing here may know what is harvested or trained.

Public:
    limits.MemoryRoom: memory that is left, under which limit
    limits.memory_room: the room under the nearest limit
    limits.room_to_live: the room before the kernel ends the process
    limits.cores: how many cores this process may use
    limits.require_memory: refuses work that may not fit
    limits.require_memory_for_array: refuses a large array that does not fit
    limits.threads_that_fit: as many threads as memory allows
    limits.thread_pool: a pool of so many
    limits.resident_bytes: what this process holds, and its peak
    limits.thread_limits: the limits on the number of threads
    limits.lacked: the error that says memory ran out
    links.open_unlinked: opens what is reached through no link
    links.own_file: opens what is written where it lies
    links.folder_of: a descriptor of the folder of a path
    installs.no_installs: inside it nothing can be installed
"""
