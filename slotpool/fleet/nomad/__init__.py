"""Containers run by a Nomad cluster: a client of its API, the job, its image, and the fleet that the pool uses.

Imports run one way: ``connection <- http <- client``, ``types <- client``, ``job <- diagnosis <- fleet``.
"""
