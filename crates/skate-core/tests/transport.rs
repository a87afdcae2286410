//! The transport on the real kernel. Several transports live in this process and find each other through
//! a node as processes would; what needs a process of its own is in `transport_alone.rs`.

#![expect(clippy::iter_over_hash_type, reason = "what is looked at in any order is looked at as a whole")]

use std::collections::HashMap;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::RwLock;

use skate_core::transport::{Address, Config, Driven, Listener, PeerInfo, SendMode};
use skate_proto::frame::{FLAG_FD, Header};
use skate_proto::handshake::{ANSWER_LEN, Connector, Credentials, HandshakeError, Preface, Role, Step};
use skate_proto::ids::ProcId;

mod cluster;
use cluster::*;

/// Tests that count descriptors take it for writing.
static ALONE: RwLock<()> = RwLock::new(());

#[test]
fn processes_find_each_other_through_the_node_and_frames_keep_their_order() {
    let _shared = ALONE.read();
    let cluster = Cluster::new();
    let (a, b) = (cluster.join(A), cluster.join(B));
    for corr in 0..1000 {
        let mode = if corr % 3 == 0 { SendMode::Now } else { SendMode::Queue };
        a.transport.send(B, 9, corr, &[b"hello ", &corr.to_le_bytes()], mode);
    }
    b.drive_until(|h| h.count() == 1000);
    for (n, (from, kind, corr, body)) in b.handler.frames.lock().iter().enumerate() {
        assert_eq!((*from, *kind, *corr), (A, 9, n as u64));
        assert_eq!(body, &[b"hello ", &corr.to_le_bytes()[..]].concat());
    }
    b.transport.send(A, 10, 5, &[], SendMode::Now);
    a.drive_until(|h| h.count() == 1);
    let info = b.transport.peer_info(A).unwrap();
    assert_eq!((info.proc, info.role, info.pid), (A, Role::Worker, std::process::id()));
    assert_eq!(a.transport.peers().iter().map(|p| p.proc).collect::<Vec<_>>(), [NODE, B]);
    assert_eq!(b.handler.joined.lock().len(), 1);
    assert!(a.handler.joined.lock().is_empty());
    assert_eq!(cluster.node.handler.joined.lock().len(), 2);
}

#[test]
fn two_processes_that_call_each_other_at_once_keep_order_in_both_directions() {
    let _shared = ALONE.read();
    let cluster = Cluster::new();
    for round in 0..20 {
        let (a, b) = (cluster.join(ProcId(100 + 2 * round)), cluster.join(ProcId(101 + 2 * round)));
        let (a_id, b_id) = (a.transport.me().proc, b.transport.me().proc);
        std::thread::scope(|scope| {
            scope.spawn(|| (0..200).for_each(|n| a.transport.send(b_id, 9, n, &[], SendMode::Now)));
            scope.spawn(|| (0..200).for_each(|n| b.transport.send(a_id, 9, n, &[], SendMode::Now)));
        });
        for process in [&a, &b] {
            process.drive_until(|h| h.count() == 200);
            let corrs: Vec<u64> = process.handler.frames.lock().iter().map(|f| f.2).collect();
            assert_eq!(corrs, (0..200).collect::<Vec<_>>());
            assert!(process.handler.closed.lock().is_empty());
        }
    }
}

#[test]
fn descriptors_travel_with_their_frames() {
    let _shared = ALONE.read();
    let cluster = Cluster::new();
    let a = cluster.join(A);
    for n in 0..20u64 {
        let (reader, mut writer) = std::io::pipe().unwrap();
        write!(writer, "{n}").unwrap();
        a.transport.send(NODE, 8, n, &[&[0; 1000]], SendMode::Queue);
        a.transport.send_fd(NODE, 99, n, &[b"fd"], reader.as_fd());
    }
    wait_for("the descriptors", || cluster.node.handler.fds.lock().len() == 20);
    for (n, fd) in cluster.node.handler.fds.lock().drain(..).enumerate() {
        let mut text = String::new();
        std::fs::File::from(fd.unwrap()).read_to_string(&mut text).unwrap();
        assert_eq!(text, n.to_string());
    }
}

#[test]
fn a_frame_may_be_as_long_as_the_cap() {
    let _shared = ALONE.read();
    let cluster = Cluster::new();
    let (a, b) = (cluster.join(A), cluster.join(B));
    let body: Vec<u8> = (0..64 << 20).map(|i| (i % 251) as u8).collect();
    a.transport.send(B, 9, 1, &[&body[..100], &body[100..]], SendMode::Now);
    b.drive_until(|h| h.count() == 1);
    a.transport.send(B, 9, 2, &[b"after"], SendMode::Now);
    b.drive_until(|h| h.count() == 2);
    let frames = b.handler.frames.lock();
    assert!(frames[0].3 == body);
    assert_eq!(frames[1].3, b"after");
    assert_eq!(a.transport.backlog(B), 0);
}

#[test]
fn another_token_or_session_is_refused_with_a_reason() {
    let _shared = ALONE.read();
    let cluster = Cluster::new();
    let refused = |change: fn(&mut Config)| {
        let mut config = cluster.config(A);
        change(&mut config);
        start(config).err().expect("refused").to_string()
    };
    assert!(refused(|c| c.token = [9; 32]).contains("cluster token"));
    assert!(refused(|c| c.session = [9; 16]).contains("another session"));
    assert!(refused(|c| c.node = ProcId(77)).contains("does not know process"));
    assert!(refused(|c| c.node_address = Address::Unix("/nonexistent/x".into())).contains("No such file"));
    let long = "/tmp/".to_owned() + &"x".repeat(200);
    let mut config = cluster.config(A);
    config.node_address = Address::Unix(long.clone().into());
    assert!(start(config).err().expect("refused").to_string().contains(&long));
}

#[test]
fn another_version_is_answered_with_ours() {
    let _shared = ALONE.read();
    let cluster = Cluster::new();
    let mut stream = UnixStream::connect(cluster.path()).unwrap();
    let preface = Preface { version: 900, session: [1; 16], target: NODE, tls: false };
    stream.write_all(&preface.encode()).unwrap();
    let mut answer = [0; ANSWER_LEN];
    stream.read_exact(&mut answer).unwrap();
    let told = u16::from_le_bytes([answer[2], answer[3]]);
    assert_eq!(told, skate_proto::handshake::PROTOCOL_VERSION);
    assert_eq!(preface.check(&[1; 16]), Err(HandshakeError::Version { ours: told, theirs: 900 }));
}

#[test]
fn garbage_ends_only_the_connection_on_which_it_came() {
    let _shared = ALONE.read();
    let cluster = Cluster::new();
    let (a, b) = (cluster.join(A), cluster.join(B));
    for garbage in [&[0u8; 4096][..], &[0xff; 31], b"GET / HTTP/1.1\r\n\r\nxxxxxxxxxxxxxxxxxxxxxxx"] {
        let mut stream = UnixStream::connect(cluster.path()).unwrap();
        let _ = stream.write_all(garbage);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest);
        assert!(rest.is_empty());
    }
    // A good preface for another process, then rubbish end to end.
    let mut stream = UnixStream::connect(cluster.path()).unwrap();
    let preface =
        Preface { version: skate_proto::handshake::PROTOCOL_VERSION, session: [1; 16], target: B, tls: false };
    stream.write_all(&preface.encode()).unwrap();
    stream.write_all(&[0xaa; 500]).unwrap();
    let mut rest = Vec::new();
    let _ = stream.read_to_end(&mut rest);
    a.transport.send(B, 9, 1, &[], SendMode::Now);
    b.drive_until(|h| h.count() == 1);
    assert!(a.handler.closed.lock().is_empty() && b.handler.closed.lock().is_empty());
    assert!(cluster.node.handler.closed.lock().is_empty());
    assert_eq!(cluster.node.handler.joined.lock().len(), 2);
}

#[test]
fn the_end_of_a_peer_is_told_once_and_the_next_frame_connects_anew() {
    let _shared = ALONE.read();
    let cluster = Cluster::new();
    let a = cluster.join(A);
    let b = cluster.join(B);
    a.transport.send(B, 9, 1, &[], SendMode::Now);
    b.transport.send(A, 9, 1, &[], SendMode::Now);
    a.drive_until(|h| h.count() == 1);
    drop(b);
    a.drive_until(|h| !h.closed.lock().is_empty());
    assert_eq!(a.handler.closed.lock().len(), 1);
    assert_eq!(a.handler.closed.lock()[0].0, B);
    wait_for("the node to notice", || !cluster.node.handler.closed.lock().is_empty());
    // It is gone, so a frame to it is refused by the node.
    a.transport.send(B, 9, 2, &[], SendMode::Now);
    a.drive_until(|h| h.closed.lock().len() == 2);
    assert!(a.handler.closed.lock()[1].1.contains("does not know"));
    let b = cluster.join(B);
    a.transport.send(B, 9, 3, &[], SendMode::Queue);
    b.drive_until(|h| h.count() == 1);
    a.transport.disconnect(B);
    a.drive_until(|h| h.closed.lock().len() == 3);
    a.transport.send(B, 9, 4, &[], SendMode::Queue);
    b.drive_until(|h| h.count() == 2);
}

#[test]
fn what_a_peer_sent_before_it_ended_is_delivered_before_its_end() {
    let _shared = ALONE.read();
    let cluster = Cluster::new();
    for round in 0..20 {
        let (a_id, b_id) = (ProcId(100 + 2 * round), ProcId(101 + 2 * round));
        let (a, b) = (cluster.join(a_id), cluster.join(b_id));
        // Mostly two connections, one for each direction.
        std::thread::scope(|scope| {
            scope.spawn(|| a.transport.send(b_id, 9, 0, &[], SendMode::Now));
            scope.spawn(|| b.transport.send(a_id, 9, 0, &[], SendMode::Now));
        });
        a.drive_until(|h| h.count() == 1);
        b.drive_until(|h| h.count() == 1);
        (0..1000).for_each(|n| b.transport.send(a_id, 9, n, &[], SendMode::Queue));
        drop(b);
        a.drive_until(|h| !h.closed.lock().is_empty());
        assert_eq!(a.handler.count(), 1001);
    }
}

#[test]
fn a_frame_to_a_peer_that_has_ended_does_not_cost_its_last_words() {
    let _shared = ALONE.read();
    let cluster = Cluster::new();
    let mut config = cluster.config(A);
    config.io_thread = false;
    let a = start(config).unwrap();
    let b = cluster.join(B);
    b.transport.send(A, 9, 0, &[], SendMode::Now);
    a.drive_until(|h| h.count() == 1);
    wait_for("the handshake's end", || b.transport.peer_info(A).is_some());
    (0..10).for_each(|n| b.transport.send(A, 9, n, &[], SendMode::Now));
    drop(b);
    a.transport.send(B, 9, 1, &[], SendMode::Now);
    a.transport.send(B, 9, 1, &[], SendMode::Now);
    a.drive_until(|h| !h.closed.lock().is_empty());
    assert_eq!(a.handler.count(), 11);
    assert_eq!(a.handler.closed.lock().len(), 1);
}

/// A peer that knows the token and is then free to misbehave.
fn raw_peer(cluster: &Cluster, me: ProcId) -> UnixStream {
    let mut stream = UnixStream::connect(cluster.path()).unwrap();
    let me = PeerInfo { proc: me, role: Role::Tool, pid: 1, python_minor: 0 };
    let credentials = Credentials { session: [1; 16], token: [2; 32] };
    let (mut connector, first) = Connector::new(&me, &credentials, NODE, [3; 32]);
    stream.write_all(&first).unwrap();
    loop {
        let mut message = vec![0; connector.wants()];
        stream.read_exact(&mut message).unwrap();
        match connector.handle(&message).unwrap() {
            Step::Send(bytes) => stream.write_all(&bytes).unwrap(),
            Step::Done { .. } => return stream,
        }
    }
}

#[test]
fn a_proven_peer_that_breaks_the_protocol_is_closed_alone() {
    let _shared = ALONE.read();
    let cluster = Cluster::new();
    let a = cluster.join(A);
    let header = |len, kind, flags| Header { body_len: len, kind, flags, corr: 0 }.encode();
    let breaches = [
        (header(u32::MAX, 9, 0), "a body of"),
        (header(0, 0, 0), "kind 0"),
        (header(0, 9, 0x40), "unknown flags"),
        (header(0, 9, FLAG_FD), "descriptors"),
    ];
    for (n, (bytes, reason)) in breaches.iter().enumerate() {
        let peer = ProcId(500 + n as u64);
        let mut stream = raw_peer(&cluster, peer);
        // A good frame before the bad one is still heard.
        stream.write_all(&[&header(0, COUNTED, 0)[..], bytes].concat()).unwrap();
        wait_for("the breach", || cluster.node.handler.closed.lock().len() == n + 1);
        let closed = cluster.node.handler.closed.lock();
        assert_eq!(closed[n].0, peer);
        assert!(closed[n].1.contains(reason), "{}", closed[n].1);
        assert_eq!(cluster.node.handler.count(), n + 1);
        assert_eq!(stream.read(&mut [0; 1]).unwrap_or(0), 0);
    }
    a.transport.send(NODE, ECHO, 1, &[], SendMode::Now);
    a.drive_until(|h| h.count() == 1);
}

#[test]
fn a_peer_that_connects_again_replaces_its_former_self() {
    let _shared = ALONE.read();
    let cluster = Cluster::new();
    let _first = raw_peer(&cluster, A);
    let mut second = raw_peer(&cluster, A);
    wait_for("both", || cluster.node.handler.joined.lock().len() == 2);
    assert!(cluster.node.handler.closed.lock()[0].1.contains("anew"));
    cluster.node.transport.send(A, 9, 1, &[], SendMode::Now);
    second.read_exact(&mut [0; 16]).unwrap();
}

#[test]
fn only_the_node_may_pass_connections() {
    let _shared = ALONE.read();
    let cluster = Cluster::new();
    let (a, b) = (cluster.join(A), cluster.join(B));
    let (mine, theirs) = UnixStream::pair().unwrap();
    a.transport.send_fd(B, 1, 0, &[&[0; 32]], theirs.as_fd());
    drop(theirs);
    assert_eq!((&mine).read(&mut [0; 1]).unwrap(), 0, "it was closed unread");
    assert!(b.handler.warnings.load(Ordering::Acquire) > 0);
}

#[test]
fn the_end_of_the_node_is_told() {
    let _shared = ALONE.read();
    let cluster = Cluster::new();
    let a = cluster.join(A);
    cluster.node.transport.shutdown();
    a.drive_until(|h| h.closed.lock().iter().any(|(peer, _)| *peer == NODE));
}

#[test]
fn a_peer_that_does_not_read_is_given_up_at_the_limit() {
    let _shared = ALONE.read();
    let cluster = Cluster::new();
    let a = cluster.join(A);
    let mut config = cluster.config(B);
    config.io_thread = false;
    let b = start(config).unwrap();
    let body = vec![0; 1 << 20];
    // B must read once, to answer the handshake.
    a.transport.send(B, 9, 0, &[], SendMode::Now);
    b.drive_until(|h| h.count() == 1);
    for _ in 0..80 {
        a.transport.send(B, 9, 0, &[&body], SendMode::Now);
    }
    a.drive_until(|h| !h.closed.lock().is_empty());
    assert!(a.handler.closed.lock()[0].1.contains("does not read"));
}

#[test]
fn drive_ends_at_its_deadline_by_wake_and_by_shutdown() {
    let _shared = ALONE.read();
    let cluster = Cluster::new();
    let a = cluster.join(A);
    let begin = Instant::now();
    let outcome = a.transport.drive(&|| false, Some(begin + Duration::from_millis(20)));
    assert_eq!(outcome, Driven::TimedOut);
    assert!((20..200).contains(&begin.elapsed().as_millis()));
    assert_eq!(a.transport.drive(&|| true, None), Driven::Done);
    let flag = AtomicBool::new(false);
    std::thread::scope(|scope| {
        // One of them drives, the others sleep; all must see the flag.
        for _ in 0..4 {
            scope.spawn(|| assert_eq!(a.transport.drive(&|| flag.load(Ordering::Acquire), None), Driven::Done));
        }
        std::thread::sleep(Duration::from_millis(10));
        flag.store(true, Ordering::Release);
        a.transport.wake();
    });
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| assert_eq!(a.transport.drive(&|| false, None), Driven::Closed));
        }
        std::thread::sleep(Duration::from_millis(10));
        a.transport.shutdown();
    });
    assert_eq!(a.transport.drive(&|| false, None), Driven::Closed);
}

#[test]
fn when_the_driving_thread_leaves_another_takes_over() {
    let _shared = ALONE.read();
    let cluster = Cluster::new();
    let a = cluster.join(A);
    for _ in 0..50 {
        let before = a.handler.count();
        let deadline = Instant::now() + Duration::from_millis(3);
        std::thread::scope(|scope| {
            scope.spawn(|| a.transport.drive(&|| false, Some(deadline)));
            scope.spawn(|| a.transport.drive(&|| false, Some(deadline + Duration::from_millis(2))));
            scope.spawn(|| a.drive_until(|h| h.count() > before));
            std::thread::sleep(Duration::from_millis(6));
            cluster.node.transport.send(A, 9, 0, &[], SendMode::Now);
        });
    }
}

extern "C" fn nothing(_signal: libc::c_int) {}

#[test]
fn a_signal_interrupts_driving_and_sleeping_threads() {
    let _shared = ALONE.read();
    // SAFETY: installs a handler that does nothing, as Python does: without SA_RESTART.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = nothing as extern "C" fn(libc::c_int) as usize;
        libc::sigaction(libc::SIGUSR1, &action, std::ptr::null_mut());
    }
    let cluster = Cluster::new();
    let a = cluster.join(A);
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        for _ in 0..2 {
            let (a, sender) = (&a, sender.clone());
            scope.spawn(move || {
                // SAFETY: has no preconditions.
                sender.send(unsafe { libc::pthread_self() }).unwrap();
                assert_eq!(a.transport.drive(&|| false, None), Driven::Interrupted);
                sender.send(0).unwrap();
            });
            std::thread::sleep(Duration::from_millis(20));
        }
        // The one that sleeps first: were the driver interrupted, the sleeper would be woken to drive, and
        // a signal that comes between two waits interrupts none of them.
        let threads: Vec<_> = (0..2).map(|_| receiver.recv().unwrap()).collect();
        for thread in threads.into_iter().rev() {
            // SAFETY: the thread runs until it is interrupted by this.
            unsafe { libc::pthread_kill(thread, libc::SIGUSR1) };
            assert_eq!(receiver.recv_timeout(Duration::from_secs(10)), Ok(0));
        }
    });
}

#[test]
fn foreign_descriptors_are_watched() {
    let _shared = ALONE.read();
    let cluster = Cluster::new();
    let a = cluster.join(A);
    let (reader, mut writer) = std::io::pipe().unwrap();
    a.transport.register_fd(u64::MAX, reader.as_fd()).unwrap();
    writer.write_all(b"1").unwrap();
    a.drive_until(|h| h.ready.lock().len() == 1);
    // Nobody reads it, and nobody spins on it; the next byte is news again.
    let deadline = Instant::now() + Duration::from_millis(5);
    a.transport.drive(&|| false, Some(deadline));
    assert_eq!(*a.handler.ready.lock(), [u64::MAX]);
    writer.write_all(b"2").unwrap();
    wait_for("the I/O thread to tell", || a.handler.ready.lock().len() == 2);
    a.transport.unregister_fd(u64::MAX);
    drop(writer);
    a.transport.drive(&|| false, Some(Instant::now() + Duration::from_millis(5)));
    assert_eq!(a.handler.ready.lock().len(), 2);
}

#[test]
fn queued_frames_leave_although_nobody_drives() {
    let _shared = ALONE.read();
    let cluster = Cluster::new();
    let (a, b) = (cluster.join(A), cluster.join(B));
    for n in 0..200 {
        // Vary where the I/O threads are: in epoll, lingering, asleep.
        if n % 4 == 0 {
            a.transport.drive(&|| false, Some(Instant::now() + Duration::from_micros(100)));
        }
        a.transport.send(B, 9, n, &[], SendMode::Queue);
        wait_for("the frame", || b.handler.count() == n as usize + 1);
    }
}

#[test]
fn calls_over_tcp_work_alike() {
    let _shared = ALONE.read();
    let listener = Listener::bind_tcp("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = listener.local_address().unwrap();
    let node = start(config(NODE, Role::Node, address.clone(), vec![listener])).unwrap();
    let a = start(config(A, Role::Driver, address, vec![])).unwrap();
    let body = vec![5; 3 << 20];
    for n in 0..10 {
        a.transport.send(NODE, 9, n, &[&body], SendMode::Now);
    }
    wait_for("the frames", || node.handler.count() == 10);
    node.transport.send(A, 9, 0, &[], SendMode::Now);
    a.drive_until(|h| h.count() == 1);
}

/// Threads of both processes call each other, drive, queue and wake, so that every hand-over between
/// user threads and I/O threads happens under load. A lost wake-up shows as a timeout.
#[test]
fn no_wake_up_is_lost_when_many_threads_send_and_drive() {
    let _shared = ALONE.read();
    let cluster = Cluster::new();
    let (a, b) = (cluster.join(A), cluster.join(B));
    let rounds = if cfg!(debug_assertions) { 4_000 } else { 20_000 };
    std::thread::scope(|scope| {
        for (me, other) in [(&a, B), (&b, A)] {
            for thread in 0..3u64 {
                scope.spawn(move || {
                    for n in 0..rounds {
                        let before = me.handler.count();
                        let mode = if (n + thread) % 3 == 0 { SendMode::Queue } else { SendMode::Now };
                        me.transport.send(other, ECHO, n, &[&[7; 40]], mode);
                        if n % 7 == thread {
                            std::thread::yield_now();
                        }
                        me.drive_until(|h| h.count() > before);
                    }
                });
            }
        }
    });
    for process in [&a, &b] {
        process.drive_until(|h| h.count() == 3 * rounds as usize);
    }
}

/// The pauses between the calls go over the time for which the I/O threads linger, back and forth.
#[test]
fn a_call_is_answered_wherever_the_reactor_is() {
    let _shared = ALONE.read();
    let cluster = Cluster::new();
    let (a, b) = (cluster.join(A), cluster.join(B));
    for n in 0..400u64 {
        for (me, other) in [(&a, B), (&b, A)] {
            let before = me.handler.count();
            let mode = if n % 3 == 0 { SendMode::Queue } else { SendMode::Now };
            me.transport.send(other, ECHO, n, &[], mode);
            me.drive_until(|h| h.count() > before);
        }
        let until = Instant::now() + Duration::from_micros(n * 37 % 700);
        while Instant::now() < until {
            std::thread::yield_now();
        }
    }
}

#[test]
fn threads_that_wait_for_each_other_within_a_process_are_woken() {
    let _shared = ALONE.read();
    let cluster = Cluster::new();
    let a = cluster.join(A);
    let turn = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for me in 0..4u64 {
            let (a, turn) = (&a, &turn);
            scope.spawn(move || {
                for round in 0..2_000 {
                    let mine = round * 4 + me;
                    a.drive_until(|_| turn.load(Ordering::Acquire) == mine);
                    turn.store(mine + 1, Ordering::Release);
                    a.transport.wake();
                }
            });
        }
    });
}

fn io_threads() -> usize {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap().flatten();
    let names = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("comm")).ok());
    names.filter(|name| name.trim() == "skate-io").count()
}

#[test]
fn nothing_is_left_after_shutdown() {
    let _alone = ALONE.write();
    drop(Cluster::new()); // What is opened once and for good is open now.
    let before = descriptors();
    for _ in 0..5 {
        let cluster = Cluster::new();
        let (a, b) = (cluster.join(A), cluster.join(B));
        a.transport.send(B, ECHO, 1, &[&[1; 100_000]], SendMode::Now);
        a.drive_until(|h| h.count() == 1);
        let (reader, writer) = std::io::pipe().unwrap();
        a.transport.register_fd(7, reader.as_fd()).unwrap();
        a.transport.send_fd(B, 50, 1, &[], writer.as_fd());
        b.drive_until(|h| h.fds.lock().len() == 1);
        b.handler.fds.lock().clear();
        drop((reader, writer));
        wait_for("three named threads", || io_threads() == 3);
        std::thread::scope(|scope| {
            scope.spawn(|| a.transport.shutdown());
            scope.spawn(|| a.transport.shutdown());
        });
        a.transport.shutdown();
        a.transport.send(B, 9, 1, &[], SendMode::Now);
        a.transport.wake();
        b.transport.shutdown();
        cluster.node.transport.shutdown();
        // The transports themselves are still there.
        assert_eq!(descriptors(), before);
        // A joined thread may be listed for a moment yet.
        wait_for("the threads' ends", || io_threads() == 0);
    }
}

#[test]
fn a_forked_child_keeps_no_connection_and_harms_none() {
    let _alone = ALONE.write();
    let cluster = Cluster::new();
    let (a, b) = (cluster.join(A), cluster.join(B));
    a.transport.send(B, ECHO, 1, &[], SendMode::Now);
    a.drive_until(|h| h.count() == 1);
    // SAFETY: the child only does what is under test, reads /proc and leaves; the C library makes its
    // allocator usable after a fork.
    let child = unsafe { libc::fork() };
    if child == 0 {
        a.transport.send(B, ECHO, 2, &[], SendMode::Now);
        a.transport.disconnect(B);
        let driven = a.transport.drive(&|| false, None);
        a.transport.shutdown();
        drop(a);
        let is_socket = |fd: std::fs::DirEntry| {
            std::fs::read_link(fd.path()).is_ok_and(|to| to.to_string_lossy().starts_with("socket:"))
        };
        let sockets = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
        let sockets = sockets.map(is_socket).filter(|is| *is).count();
        // SAFETY: ends the child at once.
        unsafe { libc::_exit(if driven == Driven::Closed { sockets as i32 } else { 99 }) };
    }
    let mut status = 0;
    // SAFETY: waits for our own child.
    unsafe { libc::waitpid(child, &mut status, 0) };
    assert_eq!(status, 0, "the child's exit code tells how many sockets it still had");
    a.transport.send(B, ECHO, 3, &[], SendMode::Now);
    a.drive_until(|h| h.count() == 2);
    assert!(a.handler.closed.lock().is_empty() && b.handler.closed.lock().is_empty());
}

#[test]
#[ignore = "slow: waits for the deadline of handshakes, 5 s"]
fn a_stranger_that_says_nothing_is_closed_at_the_deadline() {
    let _shared = ALONE.read();
    let cluster = Cluster::new();
    let mut stream = UnixStream::connect(cluster.path()).unwrap();
    let begin = Instant::now();
    assert_eq!(stream.read(&mut [0; 10]).unwrap(), 0);
    assert!((4..8).contains(&begin.elapsed().as_secs()));
}

#[test]
fn many_processes_join_and_call_one() {
    let _shared = ALONE.read();
    let cluster = Cluster::new();
    let hub = cluster.join(A);
    let many: HashMap<u64, Process> = (1000..1060).map(|n| (n, cluster.join(ProcId(n)))).collect();
    for process in many.values() {
        process.transport.send(A, ECHO, 1, &[b"x"], SendMode::Now);
    }
    for process in many.values() {
        process.drive_until(|h| h.count() == 1);
    }
    assert_eq!(hub.transport.peers().len(), 61);
}

#[test]
fn a_listening_socket_is_for_its_user_only() {
    let directory = std::env::temp_dir().join(format!("skate-mode-{}", std::process::id()));
    std::fs::create_dir_all(&directory).unwrap();
    let path: &Path = &directory.join("node.sock");
    let listener = Listener::bind_unix(path).unwrap();
    assert_eq!(listener.local_address().unwrap(), Address::Unix(path.to_owned()));
    let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(path).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600);
    std::fs::remove_dir_all(&directory).unwrap();
}
