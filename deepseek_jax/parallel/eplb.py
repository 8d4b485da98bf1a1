"""Which device holds which experts, some of them more than once, so that all devices have equally much to do.

Busy experts get replicas, and each replica takes an equal part of its expert's tokens. From the load of each expert:

    hierarchical    groups of experts go to nodes; replicas are made within a node, then spread over its devices
    global          replicas are made, and spread over all devices, whatever their group

The first keeps a node-limited token's experts of a group on one node (V3 section 2.1.2); it needs as many groups for
each node. Both are greedy: an expert with the busiest replicas gets the next one; the heaviest items are packed first,
into the pack that is lightest so far. Pure numpy, all layers at once; S slots (replicas of all experts), devices in
order, with S / devices slots each.

Source: the expert-parallel load balancer published with V3; V3 section 3.4.1 (redundant experts).
"""

from typing import NamedTuple

import numpy as np

from deepseek_jax.errors import UserError


class Placement(NamedTuple):
    """The experts on all devices, layer by layer."""

    expert_LS: np.ndarray  # expert in each slot
    replica_LS: np.ndarray  # which of its replicas that is, from 0
    count_LE: np.ndarray  # replicas of each expert


def place(load_LE: np.ndarray, n_slots: int, n_devices: int, n_groups: int = 1, n_nodes: int = 1) -> Placement:
    """Returns the hierarchical placement where groups divide over nodes, else the global one.

    Args:
        load_LE: load of each expert, such as its tokens.
        n_slots: replicas of all experts together, a multiple of `n_devices`.
        n_devices, n_nodes: where they go; devices of a node are consecutive.
        n_groups: of consecutive experts.

    Raises UserError: the numbers do not divide, or there are fewer slots than experts.
    """
    load_LE = np.asarray(load_LE, np.float64)
    n_experts = load_LE.shape[1]
    if n_slots < n_experts or n_slots % n_devices or n_devices % n_nodes or n_experts % n_groups:
        raise UserError(
            f"{n_slots} replicas of {n_experts} experts in {n_groups} groups on {n_devices} devices of {n_nodes} "
            "nodes: expected at least one replica of each expert, equally many on each device, devices on each node, "
            "and experts in each group. Choose other numbers."
        )
    if n_groups % n_nodes:
        n_groups = n_nodes = 1
    by_node_LE = _by_node(load_LE, n_groups, n_nodes)
    n_layers = len(load_LE)
    loads = np.take_along_axis(load_LE, by_node_LE, axis=1).reshape(n_layers * n_nodes, -1)
    expert, replica, count = replicated(loads, n_slots // n_nodes)
    slot = packed(np.take_along_axis(loads / count, expert, axis=1), n_devices // n_nodes)
    expert, replica = (np.take_along_axis(part, np.argsort(slot, axis=1), axis=1) for part in (expert, replica))
    first = np.tile(np.arange(n_nodes) * loads.shape[1], n_layers)[:, None]  # of the node's experts
    count_LE = np.empty(load_LE.shape, np.int64)
    np.put_along_axis(count_LE, by_node_LE, count.reshape(n_layers, -1), axis=1)
    expert_LS = np.take_along_axis(by_node_LE, (expert + first).reshape(n_layers, -1), axis=1)
    return Placement(expert_LS, replica.reshape(n_layers, -1), count_LE)


def slots(placement: Placement) -> np.ndarray:
    """Returns the slots of each expert's replicas, int32 [L, E, R]; -1 where it has fewer than R, the most it could."""
    (n_layers, n_slots), n_experts = placement.expert_LS.shape, placement.count_LE.shape[1]
    slot_LER = np.full((n_layers, n_experts, 1 + n_slots - n_experts), -1, np.int32)
    layers, slot = np.arange(n_layers)[:, None], np.arange(n_slots)
    slot_LER[layers, placement.expert_LS, placement.replica_LS] = slot
    return slot_LER


def _by_node(load_LE: np.ndarray, n_groups: int, n_nodes: int) -> np.ndarray:
    """Returns the experts in the order of the nodes to which their groups go."""
    groups_LGX = np.broadcast_to(np.arange(load_LE.shape[1]), load_LE.shape).reshape(len(load_LE), n_groups, -1)
    place_LG = packed(load_LE.reshape(groups_LGX.shape).sum(axis=-1), n_nodes)
    order_LG = np.argsort(place_LG, axis=1)
    return np.take_along_axis(groups_LGX, order_LG[..., None], axis=1).reshape(load_LE.shape)


def packed(weight_LN: np.ndarray, n_packs: int) -> np.ndarray:
    """Returns where each item goes if all packs hold equally many and weigh about the same: pack * size + place."""
    n_layers, n_items = weight_LN.shape
    size, layers = n_items // n_packs, np.arange(n_layers)
    place_LN = np.empty((n_layers, n_items), np.int64)
    weight_LP, filled_LP = np.zeros((n_layers, n_packs)), np.zeros((n_layers, n_packs), np.int64)
    for item_L in np.argsort(-weight_LN, axis=1, kind="stable").T:  # the heaviest first
        pack_L = np.argmin(np.where(filled_LP < size, weight_LP, np.inf), axis=1)
        place_LN[layers, item_L] = pack_L * size + filled_LP[layers, pack_L]
        weight_LP[layers, pack_L] += weight_LN[layers, item_L]
        filled_LP[layers, pack_L] += 1
    return place_LN


def replicated(load_LE: np.ndarray, n_slots: int) -> Placement:
    """Returns every expert once, then one replica after the other of the expert whose replicas have most to do."""
    n_layers, n_experts = load_LE.shape
    layers, count_LE = np.arange(n_layers), np.ones(load_LE.shape, np.int64)
    expert_LS = np.tile(np.arange(n_slots), (n_layers, 1))
    replica_LS = np.zeros((n_layers, n_slots), np.int64)
    for slot in range(n_experts, n_slots):
        busiest_L = np.argmax(load_LE / count_LE, axis=1)
        expert_LS[:, slot], replica_LS[:, slot] = busiest_L, count_LE[layers, busiest_L]
        count_LE[layers, busiest_L] += 1
    return Placement(expert_LS, replica_LS, count_LE)


def device_loads(load_LE: np.ndarray, placement: Placement, n_devices: int) -> np.ndarray:
    """Returns the load of each device, [L, devices], if each replica takes an equal part of its expert's."""
    share_LS = np.take_along_axis(load_LE / placement.count_LE, placement.expert_LS, axis=1)
    return share_LS.reshape(len(load_LE), n_devices, -1).sum(axis=-1)
