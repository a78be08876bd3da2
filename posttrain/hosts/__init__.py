"""The hosts of a cluster: which there are, what runs where, and what travels between them. Nothing is shared but Ray.

    placement.py   which host an actor is placed on; the home host, on which everything that writes is pinned
    directory.py   the actor that knows the hosts: it probes them, suspects the silent ones, and ends what they left
    agent.py       one actor a host: brings model folders and weights to its host, once for all processes there
    lease.py       ends the engines of a host that the home host has not been heard on
    relay.py       bytes from host to host, in a chain that survives the loss of a host in its middle
    weights.py     weights of a publisher on other hosts; deltas.py: what changed between two versions
    folders.py     model folders by the hash of their content, in a cache of the host
    away.py        what ranks on another host read from the home host, and what it takes from them
    afterwards.py  removes what a killed process leaves on a host on which nothing else of the run may be alive
    checks.py      compares packages and clocks of the hosts before a run

In a local session (without RAY_ADDRESS) none of this runs.
"""
