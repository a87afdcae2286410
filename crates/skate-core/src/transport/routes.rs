//! Which process lives on which node, and where the other nodes listen.
//!
//! Nothing here connects or asks: the reactor looks up the way to a process ([`Routes::way`]) and does so. Who
//! lives where is said by whoever speaks of a process ([`Routes::set`]); where a node listens, by whoever was asked
//! for it. A process of which nothing was said is looked for on our own node.
//!
//! Invariants: a node is in `order` exactly once if it is in `nodes`; our own node is in neither. A route is dropped
//! when the connection with its process ends, other than for want of the node, and when the process is known to be
//! dead, so there are as many as there are living processes on other nodes that this one has heard of.

use std::collections::{HashMap, VecDeque};

use foldhash::fast::RandomState;

use skate_proto::ids::ProcId;

use super::socket::Address;

/// Routes to processes. Those that come when there are so many are not kept: their processes are looked for on our
/// own node, which does not know them, and so are reported as lost. More than a large cluster has processes.
const ROUTES_MAX: usize = 1 << 20;
/// Nodes of which the address or the end is known. The one that was learned first is forgotten when there is one
/// more, and asked for again when it is wanted. More than a large cluster has nodes.
const NODES_MAX: usize = 16 << 10;

/// What is known of another node.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Node {
    At(Address),
    /// It only connects outwards, and is reached at the head's address.
    Behind(Address),
    /// Its cause, in words.
    Gone(String),
}

/// How a process is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Way {
    OwnNode,
    Node(Address),
    /// Its node's address is not known.
    Unknown(ProcId),
    /// Its node is gone, for this reason.
    Gone(String),
    /// This process does not connect to it.
    None,
}

pub(super) struct Routes {
    me: ProcId,
    own: ProcId,
    by_proc: HashMap<ProcId, ProcId, RandomState>,
    nodes: HashMap<ProcId, Node, RandomState>,
    /// As they were learned.
    order: VecDeque<ProcId>,
}

impl Routes {
    pub(super) fn new(me: ProcId, own: ProcId) -> Self {
        Self { me, own, by_proc: HashMap::default(), nodes: HashMap::default(), order: VecDeque::new() }
    }

    pub(super) fn set(&mut self, proc: ProcId, node: ProcId) {
        if node == self.own {
            self.by_proc.remove(&proc);
        } else if self.by_proc.len() < ROUTES_MAX || self.by_proc.contains_key(&proc) {
            self.by_proc.insert(proc, node);
        }
    }

    pub(super) fn drop_route(&mut self, proc: ProcId) {
        self.by_proc.remove(&proc);
    }

    pub(super) fn set_address(&mut self, node: ProcId, address: Address) {
        self.note(node, Node::At(address));
    }

    pub(super) fn set_address_of_head(&mut self, node: ProcId, address: Address) {
        self.note(node, Node::Behind(address));
    }

    pub(super) fn forget_node(&mut self, node: ProcId, cause: &str) {
        self.note(node, Node::Gone(cause.to_owned()));
    }

    fn note(&mut self, node: ProcId, known: Node) {
        // Where our own node listens was known from the start.
        if node == self.own || self.nodes.insert(node, known).is_some() {
            return;
        }
        self.order.push_back(node);
        if self.order.len() > NODES_MAX
            && let Some(first) = self.order.pop_front()
        {
            self.nodes.remove(&first);
        }
    }

    /// Whether a process lives on this node, or is it.
    pub(super) fn is_on(&self, proc: ProcId, node: ProcId) -> bool {
        proc == node || self.by_proc.get(&proc) == Some(&node)
    }

    /// Whether the way to a process leads through the head, which may be away without the process being so.
    pub(super) fn is_behind_head(&self, proc: ProcId) -> bool {
        let node = self.by_proc.get(&proc).unwrap_or(&proc);
        matches!(self.nodes.get(node), Some(Node::Behind(_)))
    }

    pub(super) fn way(&self, to: ProcId) -> Way {
        if to == self.me {
            return Way::None;
        }
        if self.me == self.own {
            // A node's members connect to it. It connects to other nodes, and is told beforehand where they are.
            return match self.nodes.get(&to) {
                Some(Node::At(address) | Node::Behind(address)) => Way::Node(address.clone()),
                Some(Node::Gone(cause)) => Way::Gone(cause.clone()),
                None => Way::None,
            };
        }
        let Some(node) = self.by_proc.get(&to) else {
            return Way::OwnNode;
        };
        match self.nodes.get(node) {
            Some(Node::At(address) | Node::Behind(address)) => Way::Node(address.clone()),
            Some(Node::Gone(cause)) => Way::Gone(cause.clone()),
            None => Way::Unknown(*node),
        }
    }

    /// Routes and nodes that are known.
    pub(super) fn len(&self) -> (usize, usize) {
        (self.by_proc.len(), self.nodes.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ME: ProcId = ProcId(1);
    const OWN: ProcId = ProcId(2);
    const OTHER: ProcId = ProcId(3);
    const THERE: ProcId = ProcId(4);

    fn address(port: u16) -> Address {
        Address::Tcp(([127, 0, 0, 1], port).into())
    }

    #[test]
    fn a_member_looks_on_its_own_node_for_whom_it_was_told_nothing_about() {
        let mut routes = Routes::new(ME, OWN);
        assert_eq!(routes.way(THERE), Way::OwnNode);
        assert_eq!(routes.way(ME), Way::None);
        routes.set(THERE, OTHER);
        assert_eq!(routes.way(THERE), Way::Unknown(OTHER));
        routes.set_address(OTHER, address(7));
        assert_eq!(routes.way(THERE), Way::Node(address(7)));
        routes.forget_node(OTHER, "it left");
        assert_eq!(routes.way(THERE), Way::Gone("it left".into()));
        assert!(routes.is_on(THERE, OTHER) && routes.is_on(OTHER, OTHER) && !routes.is_on(ME, OTHER));
        routes.set_address(OTHER, address(8));
        assert_eq!(routes.way(THERE), Way::Node(address(8)));
        routes.drop_route(THERE);
        assert_eq!((routes.way(THERE), routes.len()), (Way::OwnNode, (0, 1)));
    }

    #[test]
    fn a_process_behind_the_head_is_told_from_others_for_as_long_as_its_node_is() {
        for own in [OWN, ME] {
            let mut routes = Routes::new(ME, own);
            routes.set(THERE, OTHER);
            routes.set_address_of_head(OTHER, address(7));
            assert_eq!(routes.way(if own == ME { OTHER } else { THERE }), Way::Node(address(7)));
            assert!(routes.is_behind_head(THERE) && routes.is_behind_head(OTHER) && !routes.is_behind_head(OWN));
            routes.forget_node(OTHER, "it left");
            assert!(!routes.is_behind_head(THERE) && !routes.is_behind_head(OTHER));
        }
    }

    #[test]
    fn a_process_on_our_own_node_needs_no_route() {
        let mut routes = Routes::new(ME, OWN);
        routes.set(THERE, OTHER);
        routes.set(THERE, OWN);
        assert_eq!((routes.way(THERE), routes.len()), (Way::OwnNode, (0, 0)));
    }

    #[test]
    fn a_node_connects_to_other_nodes_and_to_no_member() {
        let mut routes = Routes::new(OWN, OWN);
        routes.set(THERE, OTHER);
        routes.set_address(OTHER, address(7));
        assert_eq!(routes.way(THERE), Way::None);
        assert_eq!(routes.way(OTHER), Way::Node(address(7)));
        routes.forget_node(OTHER, "it left");
        assert_eq!(routes.way(OTHER), Way::Gone("it left".into()));
    }

    #[test]
    fn the_node_that_was_learned_first_is_forgotten_first() {
        let mut routes = Routes::new(OWN, OWN);
        let nodes = 100..100 + NODES_MAX as u64 + 1;
        for node in nodes.clone() {
            routes.set_address(ProcId(node), address(7));
            routes.forget_node(ProcId(node), "again");
        }
        assert_eq!(routes.len(), (0, NODES_MAX));
        assert_eq!(routes.way(ProcId(nodes.start)), Way::None);
        assert_eq!(routes.way(ProcId(nodes.start + 1)), Way::Gone("again".into()));
    }

    #[test]
    fn routes_beyond_the_limit_are_not_kept() {
        let mut routes = Routes::new(ME, OWN);
        (0..ROUTES_MAX as u64 + 1).for_each(|n| routes.set(ProcId(100 + n), OTHER));
        assert_eq!(routes.len().0, ROUTES_MAX);
        assert_eq!(routes.way(ProcId(100 + ROUTES_MAX as u64)), Way::OwnNode);
        routes.set(ProcId(100), THERE);
        assert_eq!(routes.way(ProcId(100)), Way::Unknown(THERE), "one that is known may change");
    }
}
