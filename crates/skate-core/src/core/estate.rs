//! What is written down for the time after this process, and questions about what others have left.
//!
//! The register is made when the first object is recorded; its descriptor leaves for the node at once, ahead of the
//! message that gives the object away. Only workers have one: with its driver a job ends, and with that everything of
//! the job.

use skate_proto::handshake::Role;
use skate_proto::ids::ObjectId;
use skate_proto::objects::Bequest;

use super::{Core, State};
use crate::node_wire;
use crate::register::{REGISTER_BYTES, Register};

/// Objects of one question; more are several questions.
const QUESTION_OBJECTS_MAX: usize = 16_384;

/// Keeps the register, once there is one.
#[derive(Default)]
pub(super) enum Recorder {
    #[default]
    Unused,
    Open(Box<Register>),
    /// It could not be made: what this process owns dies with it.
    Failed,
}

impl Recorder {
    pub(super) fn len(&self) -> usize {
        match self {
            Self::Open(register) => register.len(),
            Self::Unused | Self::Failed => 0,
        }
    }
}

impl Core {
    pub(super) fn record(&self, state: &mut State, object: ObjectId) {
        let State { owner, register, .. } = state;
        // A value that has gone again since was unrecorded, or is about to be.
        let Some(value) = owner.objects.value(object).filter(|_| self.role == Role::Worker) else { return };
        if matches!(register, Recorder::Unused) {
            *register = self.open_register();
        }
        if let Recorder::Open(register) = register {
            let Bequest { location, deed } = Bequest::of(value);
            let deed = deed.map(|deed| postcard::to_stdvec(&deed).expect("plain data always encodes"));
            register.enter(object, location.as_ref(), deed.as_deref());
        }
    }

    pub(super) fn unrecord(&self, state: &mut State, object: ObjectId) {
        if let Recorder::Open(register) = &mut state.register {
            register.remove(object);
        }
    }

    fn open_register(&self) -> Recorder {
        let Ok((register, fd)) = Register::create() else { return Recorder::Failed };
        let body = node_wire::register_opened(REGISTER_BYTES);
        self.transport().send_fd(self.node, node_wire::REGISTER_OPENED, 0, &[&body], std::os::fd::AsFd::as_fd(&fd));
        Recorder::Open(Box::new(register))
    }

    /// Passes on what the nodes of dead owners must be told.
    pub(super) fn ask_estates(&self, state: &mut State) {
        for question in state.owner.objects.take_questions() {
            for given_up in question.given_up.chunks(QUESTION_OBJECTS_MAX) {
                let body = node_wire::estate_question(question.node, given_up, &[]);
                self.tell_node(node_wire::ESTATE_QUESTION, 0, &body);
            }
            for claimed in question.claimed.chunks(QUESTION_OBJECTS_MAX) {
                let body = node_wire::estate_question(question.node, &[], claimed);
                self.tell_node(node_wire::ESTATE_QUESTION, 0, &body);
            }
        }
    }
}
