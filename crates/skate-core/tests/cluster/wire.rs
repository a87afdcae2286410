//! What lies between two nodes: a relay that sees everything, and may change it.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::thread::JoinHandle;

use parking_lot::Mutex;

use skate_core::transport::Address;

pub(crate) fn tcp(address: &Address) -> SocketAddr {
    match address {
        Address::Tcp(address) => *address,
        Address::Unix(path) => panic!("{}", path.display()),
    }
}

/// Gets what passes in one direction, and how much went before.
type Tamper = dyn Fn(usize, &mut [u8]) + Send + Sync;

/// A relay in front of a node, for one connection: everything that passes is kept, and may be changed.
pub(crate) struct Wire {
    pub(crate) address: Address,
    pub(crate) seen: Arc<Mutex<Vec<u8>>>,
    pub(crate) accepting: JoinHandle<()>,
}

impl Wire {
    /// May change what goes to the node.
    pub(crate) fn to(node: &Address, tamper: impl Fn(usize, &mut [u8]) + Send + Sync + 'static) -> Self {
        Self::between(node, Box::new(tamper), Box::new(|_, _| {}))
    }

    /// May change what comes from the node.
    pub(crate) fn back_from(node: &Address, tamper: impl Fn(usize, &mut [u8]) + Send + Sync + 'static) -> Self {
        Self::between(node, Box::new(|_, _| {}), Box::new(tamper))
    }

    fn between(node: &Address, forth: Box<Tamper>, back: Box<Tamper>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = Address::Tcp(listener.local_addr().unwrap());
        let (seen, node) = (Arc::<Mutex<Vec<u8>>>::default(), tcp(node));
        let kept = Arc::clone(&seen);
        let accepting = std::thread::spawn(move || {
            let (near, _) = listener.accept().unwrap();
            let far = TcpStream::connect(node).unwrap();
            let (back_from, back_to) = (far.try_clone().unwrap(), near.try_clone().unwrap());
            let kept_back = Arc::clone(&kept);
            let returning = std::thread::spawn(move || relay(back_from, back_to, &kept_back, &*back));
            relay(near, far, &kept, &*forth);
            returning.join().unwrap();
        });
        Self { address, seen, accepting }
    }

    pub(crate) fn has_seen(&self, text: &[u8]) -> bool {
        self.seen.lock().windows(text.len()).any(|window| window == text)
    }
}

pub(crate) fn relay(mut from: TcpStream, mut to: TcpStream, kept: &Mutex<Vec<u8>>, tamper: &dyn Fn(usize, &mut [u8])) {
    let (mut buffer, mut before) = (vec![0; 64 << 10], 0);
    while let Ok(len @ 1..) = from.read(&mut buffer) {
        kept.lock().extend_from_slice(&buffer[..len]);
        tamper(before, &mut buffer[..len]);
        before += len;
        if to.write_all(&buffer[..len]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Write);
    let _ = from.shutdown(Shutdown::Both);
}
