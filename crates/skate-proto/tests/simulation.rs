//! A handful of processes on a simulated network, driven by a random schedule.
//!
//! Each process runs the real machines. A link delivers in order; which link delivers next is the
//! schedule's choice. A process can hold references, put values that contain them, submit tasks with
//! them, run tasks that return them, drop them, and die. The oracle is global:
//!
//! - safety, after every step: an object that a living process holds is known to its living owner;
//! - liveness, when everything has been delivered and dropped: nothing is left anywhere.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use proptest::prelude::*;
use skate_proto::executor::{Executor, Work};
use skate_proto::ids::{FunctionId, LeaseId, NodeKey, ObjectId, ProcId};
use skate_proto::leases::{ClassId, ClassSpec};
use skate_proto::msg::{CallDef, Msg, Returns, Slot};
use skate_proto::owner::{Effect, Out, Owner, ToNode};
use skate_proto::payload::{Blob, Payload, Value};

const NODE: u64 = 100;

struct Process {
    owner: Owner,
    executor: Executor,
    out: Out,
    held: Vec<ObjectId>,
    running: Vec<Work>,
    def: u32,
    alive: bool,
}

struct World {
    processes: BTreeMap<ProcId, Process>,
    links: BTreeMap<(ProcId, ProcId), VecDeque<Msg>>,
    /// Leases: holder, class and worker; a worker serves one lease at a time.
    leases: BTreeMap<LeaseId, (ProcId, ProcId)>,
    demands: VecDeque<(ProcId, ClassId, u32)>,
    next_lease: u64,
    now: u64,
}

impl World {
    fn new(count: u64) -> Self {
        let mut processes = BTreeMap::new();
        for number in 1..=count {
            let mut owner = Owner::new(ProcId(number), NodeKey(NODE));
            let class = owner.class(ClassSpec { demand: vec![("CPU".into(), 10_000)], env: vec![], strategy: vec![], label: String::new() });
            let call = CallDef {
                function: FunctionId([1; 16]), name: "f".into(), method: String::new(), group: String::new(),
                returns: Returns::Count(1), retry_exceptions: false, backpressure: 0, actor: None,
            };
            let def = owner.define(call, Blob::new(b"f"), Some(class), 1);
            let process = Process {
                owner, executor: Executor::default(), out: Out::default(), held: Vec::new(), running: Vec::new(), def, alive: true,
            };
            processes.insert(ProcId(number), process);
        }
        Self { processes, links: BTreeMap::new(), leases: BTreeMap::new(), demands: VecDeque::new(), next_lease: 0, now: 0 }
    }

    fn perform(&mut self, me: ProcId) {
        loop {
            let process = self.processes.get_mut(&me).unwrap();
            let effects = std::mem::take(&mut process.out.effects);
            if effects.is_empty() {
                return;
            }
            for effect in effects {
                match effect {
                    Effect::Send { to, msg, .. } if to == me => self.receive(me, me, msg),
                    Effect::Send { to, msg, .. } => {
                        if self.processes[&to].alive {
                            self.links.entry((me, to)).or_default().push_back(msg);
                        }
                    }
                    Effect::Node(ToNode::LeaseDemand { class, count }) => {
                        self.demands.retain(|(p, c, _)| (*p, *c) != (me, class));
                        if count > 0 {
                            self.demands.push_back((me, class, count));
                        }
                    }
                    Effect::Node(ToNode::LeaseReturn { lease, .. }) => {
                        self.leases.remove(&lease);
                    }
                    Effect::Node(_) | Effect::Notify(_) | Effect::Free(_) => {}
                }
            }
        }
    }

    fn receive(&mut self, from: ProcId, to: ProcId, msg: Msg) {
        let now = self.now;
        let Process { owner, executor, out, .. } = self.processes.get_mut(&to).unwrap();
        match msg {
            Msg::Define { id, def, blob } => executor.handle_define(from, id, def, blob),
            Msg::Forget { ids } => executor.handle_forget(from, &ids),
            Msg::Push(push) => {
                let counted = Executor::counted(&push.args, &push.deps);
                owner.objects.arrive(&counted);
                if executor.handle_push(from, push, out).is_none() {
                    owner.release_all(&counted, out);
                }
            }
            Msg::Steal { max } => {
                let counted = executor.handle_steal(from, max, out);
                owner.release_all(&counted, out);
            }
            Msg::Cancel { task, .. } => {
                let (_, counted) = executor.handle_cancel(task, out);
                owner.release_all(&counted, out);
            }
            Msg::ItemsTaken { .. } | Msg::FreeBlocks { .. } => {}
            other => owner.handle_message(from, other, now, out),
        }
        self.perform(to);
    }

    /// The node lends one worker to who has waited longest; true if it did.
    fn grant(&mut self) -> bool {
        for _ in 0..self.demands.len() {
            let (owner, class, count) = self.demands.pop_front().unwrap();
            if !self.processes[&owner].alive {
                continue;
            }
            let busy: BTreeSet<ProcId> = self.leases.values().map(|(_, worker)| *worker).collect();
            let worker = self.processes.iter().find(|(id, p)| p.alive && **id != owner && !busy.contains(id)).map(|(id, _)| *id);
            let Some(worker) = worker else {
                self.demands.push_back((owner, class, count));
                continue;
            };
            if count > 1 {
                self.demands.push_back((owner, class, count - 1));
            }
            self.next_lease += 1;
            let lease = LeaseId(self.next_lease);
            self.leases.insert(lease, (owner, worker));
            let now = self.now;
            let process = self.processes.get_mut(&owner).unwrap();
            process.owner.handle_lease_granted(class, lease, worker, 1, vec![], now, &mut process.out);
            self.perform(owner);
            return true;
        }
        false
    }

    fn deliver(&mut self, choice: usize) -> bool {
        let ready: Vec<_> = self.links.iter().filter(|(_, q)| !q.is_empty()).map(|(k, _)| *k).collect();
        let Some(&(from, to)) = ready.get(choice % ready.len().max(1)) else { return false };
        let msg = self.links.get_mut(&(from, to)).unwrap().pop_front().unwrap();
        if self.processes[&to].alive {
            self.receive(from, to, msg);
        }
        true
    }

    /// A worker takes up a task, or ends one and returns some of what it sees.
    fn work(&mut self, me: ProcId, choice: usize) -> bool {
        let process = self.processes.get_mut(&me).unwrap();
        if let Some(work) = process.executor.take("") {
            process.running.push(work);
            return true;
        }
        if process.running.is_empty() {
            return false;
        }
        let work = process.running.remove(choice % process.running.len());
        let counted = Executor::counted(&work.args, &work.deps);
        // The task keeps some of the references, and returns others.
        let mut refs = Vec::new();
        for (at, id) in work.args.refs.iter().enumerate() {
            if (choice >> at) & 1 == 1 {
                process.owner.objects.retain(*id);
                process.held.push(*id);
            } else {
                refs.push(*id);
            }
        }
        let results = vec![Value::Inline(Payload { data: Blob::new(b"r"), refs })];
        for value in &results {
            process.owner.objects.hand_over(value.refs(), work.owner, &mut process.out);
        }
        process.executor.answer(work.owner, work.task, results, false, 1000, 0, &mut process.out);
        process.owner.release_all(&counted, &mut process.out);
        self.perform(me);
        true
    }

    fn put(&mut self, me: ProcId, choice: usize) {
        let process = self.processes.get_mut(&me).unwrap();
        let refs: Vec<ObjectId> = process.held.iter().enumerate().filter(|(at, _)| (choice >> at) & 1 == 1).map(|(_, id)| *id).take(3).collect();
        let id = process.owner.put(Value::Inline(Payload { data: Blob::new(b"v"), refs }));
        process.held.push(id);
    }

    fn submit(&mut self, me: ProcId, choice: usize) {
        let now = self.now;
        let process = self.processes.get_mut(&me).unwrap();
        let refs: Vec<ObjectId> = process.held.iter().enumerate().filter(|(at, _)| (choice >> at) & 1 == 1).map(|(_, id)| *id).take(3).collect();
        let deps: Vec<(Slot, ObjectId)> = process.held.get(choice % 7).map(|id| (Slot::Position(0), *id)).into_iter().collect();
        let args = Payload { data: Blob::new(b"a"), refs };
        let task = process.owner.submit(process.def, args, deps, None, None, now, &mut process.out).unwrap();
        process.held.push(ObjectId { task, index: 0 });
        self.perform(me);
    }

    fn drop_one(&mut self, me: ProcId, choice: usize) {
        let process = self.processes.get_mut(&me).unwrap();
        if !process.held.is_empty() {
            let id = process.held.swap_remove(choice % process.held.len());
            process.owner.release(id, &mut process.out);
            self.perform(me);
        }
    }

    /// A reader opens a value and keeps what is inside.
    fn open(&mut self, me: ProcId, choice: usize) {
        let process = self.processes.get_mut(&me).unwrap();
        if process.held.is_empty() {
            return;
        }
        let id = process.held[choice % process.held.len()];
        let watch = skate_proto::objects::WaiterId(0);
        if process.owner.objects.watch(id, watch, &mut process.out) {
            let inner: Vec<ObjectId> = process.owner.objects.value(id).unwrap().refs().to_vec();
            for inner in inner {
                process.owner.objects.retain(inner);
                process.held.push(inner);
            }
        }
        self.perform(me);
    }

    fn kill(&mut self, victim: ProcId) {
        self.processes.get_mut(&victim).unwrap().alive = false;
        // What it had sent is delivered first: sockets outlive their writers.
        let links: Vec<_> = self.links.keys().filter(|(from, _)| *from == victim).copied().collect();
        for link in links {
            while let Some(msg) = self.links.get_mut(&link).and_then(VecDeque::pop_front) {
                if self.processes[&link.1].alive {
                    self.receive(link.0, link.1, msg);
                }
            }
        }
        self.links.retain(|(from, to), _| *from != victim && *to != victim);
        self.leases.retain(|_, (owner, worker)| *owner != victim && *worker != victim);
        self.demands.retain(|(owner, ..)| *owner != victim);
        let others: Vec<ProcId> = self.processes.iter().filter(|(_, p)| p.alive).map(|(id, _)| *id).collect();
        for other in others {
            let now = self.now;
            let Process { owner, executor, out, .. } = self.processes.get_mut(&other).unwrap();
            owner.handle_process_gone(victim, "killed", false, now, out);
            let (counted, _) = executor.handle_process_gone(victim);
            owner.release_all(&counted, out);
            self.perform(other);
        }
    }

    fn check_safety(&self) {
        for (me, process) in self.processes.iter().filter(|(_, p)| p.alive) {
            for id in &process.held {
                assert!(process.owner.objects.is_known(*id), "{me:?} holds {id}, which it does not know");
                let owner = &self.processes[&id.owner()];
                assert!(!owner.alive || owner.owner.objects.is_known(*id), "{me:?} holds {id}, which its owner has freed");
            }
        }
    }

    fn settle(&mut self) {
        for _ in 0..100_000 {
            let mut busy = self.deliver(0);
            busy |= self.grant();
            let ids: Vec<ProcId> = self.processes.iter().filter(|(_, p)| p.alive).map(|(id, _)| *id).collect();
            for id in &ids {
                busy |= self.work(*id, 0);
            }
            self.check_safety();
            if !busy {
                // Leases that nobody uses go back after a while.
                self.now += 1_000_000_000;
                for id in ids {
                    let now = self.now;
                    let process = self.processes.get_mut(&id).unwrap();
                    process.owner.handle_timeout(now, &mut process.out);
                    self.perform(id);
                }
                if !self.grant() && self.links.values().all(VecDeque::is_empty) {
                    return;
                }
            }
        }
        panic!("the world does not come to rest: demands {:?}", self.demands);
    }
}

#[derive(Clone, Debug)]
enum Step {
    Put(u64, usize),
    Submit(u64, usize),
    Drop(u64, usize),
    Open(u64, usize),
    Work(u64, usize),
    Deliver(usize),
    Grant,
    Kill(u64),
}

fn steps(kills: bool) -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        2 => (1..=4_u64, any::<usize>()).prop_map(|(p, c)| Step::Put(p, c)),
        3 => (1..=4_u64, any::<usize>()).prop_map(|(p, c)| Step::Submit(p, c)),
        3 => (1..=4_u64, any::<usize>()).prop_map(|(p, c)| Step::Drop(p, c)),
        2 => (1..=4_u64, any::<usize>()).prop_map(|(p, c)| Step::Open(p, c)),
        4 => (1..=4_u64, any::<usize>()).prop_map(|(p, c)| Step::Work(p, c)),
        8 => any::<usize>().prop_map(Step::Deliver),
        2 => Just(Step::Grant),
        u32::from(kills) => (2..=4_u64).prop_map(Step::Kill),
    ];
    prop::collection::vec(step, 1..120)
}

fn run(steps: &[Step]) -> World {
    let mut world = World::new(4);
    for step in steps {
        world.now += 1000;
        let alive = |world: &World, p: u64| world.processes[&ProcId(p)].alive;
        match *step {
            Step::Put(p, c) if alive(&world, p) => world.put(ProcId(p), c),
            Step::Submit(p, c) if alive(&world, p) => world.submit(ProcId(p), c),
            Step::Drop(p, c) if alive(&world, p) => world.drop_one(ProcId(p), c),
            Step::Open(p, c) if alive(&world, p) => world.open(ProcId(p), c),
            Step::Work(p, c) if alive(&world, p) => {
                world.work(ProcId(p), c);
            }
            Step::Deliver(c) => {
                world.deliver(c);
            }
            Step::Grant => {
                world.grant();
            }
            // One process stays: the driver.
            Step::Kill(p) if alive(&world, p) => world.kill(ProcId(p)),
            _ => {}
        }
        world.check_safety();
    }
    world
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, ..ProptestConfig::default() })]

    #[test]
    fn referenced_objects_live_and_unreferenced_ones_vanish(steps in steps(false)) {
        let mut world = run(&steps);
        world.settle();
        for (id, process) in &world.processes {
            for held in &process.held {
                prop_assert!(process.owner.objects.is_known(*held), "{id:?} lost {held}");
            }
        }
        let ids: Vec<ProcId> = world.processes.keys().copied().collect();
        for id in ids {
            while !world.processes[&id].held.is_empty() {
                world.drop_one(id, 0);
            }
        }
        world.settle();
        for (id, process) in &world.processes {
            prop_assert_eq!(process.owner.objects.len(), 0, "{:?} kept objects: {:?}", id, process.owner.objects);
        }
    }

    #[test]
    fn deaths_free_what_the_dead_held_and_end_every_wait(steps in steps(true)) {
        let mut world = run(&steps);
        world.settle();
        let me = ProcId(1);
        let held = world.processes[&me].held.clone();
        let watch = skate_proto::objects::WaiterId(9);
        for id in held {
            let process = world.processes.get_mut(&me).unwrap();
            process.owner.objects.watch(id, watch, &mut process.out);
            world.perform(me);
        }
        world.settle();
        let workers_left = world.processes.iter().filter(|(id, p)| **id != me && p.alive).count();
        if workers_left > 0 {
            for id in &world.processes[&me].held {
                prop_assert!(world.processes[&me].owner.objects.is_ready(*id), "{id} never becomes ready");
            }
            let ids: Vec<ProcId> = world.processes.iter().filter(|(_, p)| p.alive).map(|(id, _)| *id).collect();
            for id in ids {
                while !world.processes[&id].held.is_empty() {
                    world.drop_one(id, 0);
                }
            }
            world.settle();
            for (id, process) in world.processes.iter().filter(|(_, p)| p.alive) {
                prop_assert_eq!(process.owner.objects.len(), 0, "{:?} kept objects: {:?}", id, process.owner.objects);
            }
        }
    }
}

#[test]
fn a_single_task_runs_on_a_lent_worker() {
    let mut world = World::new(2);
    world.submit(ProcId(1), 0);
    world.settle();
    let process = &world.processes[&ProcId(1)];
    assert!(process.owner.objects.is_ready(process.held[0]));
    assert!(world.leases.is_empty(), "an idle lease goes back");
}
