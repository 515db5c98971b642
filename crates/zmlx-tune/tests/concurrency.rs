//! Many processes and threads writing one file at once lose nothing.

mod common;

use common::{decision, key};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use zmlx_tune::Store;

const PROCESSES: usize = 8;
const THREADS: usize = 2;
const PUTS: usize = 10;

/// Set in child processes: the directory and the child's number.
const DIRECTORY: &str = "ZMLX_TUNE_TEST_DIRECTORY";
const NUMBER: &str = "ZMLX_TUNE_TEST_NUMBER";

/// Starts this test program again, to run one of the `child_` tests below only.
fn start(test: &str, directory: &Path, number: usize) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test])
        .env(DIRECTORY, directory)
        .env(NUMBER, number.to_string())
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

/// The directory and number given by the parent; without one, a directory of its own.
fn child_place(own: &Path) -> (std::path::PathBuf, usize) {
    match std::env::var_os(DIRECTORY) {
        Some(directory) => (directory.into(), std::env::var(NUMBER).unwrap().parse().unwrap()),
        None => (own.into(), 0),
    }
}

/// Threads that write keys of their own, each through a store of its own. Also a test by itself.
#[test]
fn child_writes_its_keys() {
    let own = tempfile::tempdir().unwrap();
    let (directory, number) = child_place(own.path());
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let directory = &directory;
            scope.spawn(move || {
                let store = Store::open(directory).with_lock_timeout(Duration::from_secs(120));
                for put in 0..PUTS {
                    let n = (number * THREADS + thread) * PUTS + put;
                    let saved = store.put(&decision(&key(n), 100 + n as i64)).unwrap();
                    assert_eq!((saved.moved_aside, saved.dropped), (None, 0));
                }
            });
        }
    });
    let first = number * THREADS * PUTS;
    assert!(Store::open(&directory).get(&key(first)).unwrap().is_some());
}

#[test]
fn processes_and_threads_lose_no_decision() {
    let dir = tempfile::tempdir().unwrap();
    let mut children: Vec<Child> =
        (0..PROCESSES).map(|number| start("child_writes_its_keys", dir.path(), number)).collect();
    // A reader that runs beside the writers sees only whole files, and decisions never vanish.
    let mut seen = 0;
    while children.iter_mut().any(|child| child.try_wait().unwrap().is_none()) {
        let now = Store::open(dir.path()).list(&key(0)).unwrap().len();
        assert!(now >= seen, "{now} decisions after {seen}");
        seen = now;
    }
    for child in &mut children {
        assert!(child.wait().unwrap().success());
    }
    let store = Store::open(dir.path());
    let missing: Vec<usize> = (0..PROCESSES * THREADS * PUTS)
        .filter(|&n| {
            let found = store.get(&key(n)).unwrap();
            found.is_none_or(|found| found.decision.as_ref() != &decision(&key(n), 100 + n as i64))
        })
        .collect();
    assert_eq!(missing, [0; 0]);
}

/// Writes until killed, a minute at most in case the parent fails; by itself, ten times.
#[test]
fn child_writes_without_end() {
    let own = tempfile::tempdir().unwrap();
    let (directory, _) = child_place(own.path());
    let store = Store::open(&directory);
    let is_child = std::env::var_os(DIRECTORY).is_some();
    let start = Instant::now();
    for n in (0..).take_while(|&n| if is_child { start.elapsed() < Duration::from_secs(60) } else { n < 10 })
    {
        store.put(&decision(&key(n % 50), 100)).unwrap();
    }
    assert!(store.list(&key(0)).unwrap().len() >= 10);
}

#[test]
fn a_killed_writer_leaves_a_whole_file_and_no_lock() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path());
    store.put(&decision(&key(1000), 7)).unwrap();
    for round in 0..10 {
        let mut child = start("child_writes_without_end", dir.path(), 0);
        let before = store.list(&key(0)).unwrap().len();
        let start = Instant::now();
        // At other moments of a write in each round; the first must have written something.
        while round == 0 && store.list(&key(0)).unwrap().len() == before {
            assert!(start.elapsed() < Duration::from_secs(60), "the child writes nothing");
        }
        std::thread::sleep(Duration::from_millis(20 + 7 * round));
        child.kill().unwrap();
        child.wait().unwrap();
        let left = Store::open(dir.path()).list(&key(0)).unwrap();
        assert!(left.iter().any(|d| d.key == key(1000)), "round {round}");
        store.put(&decision(&key(2000 + round as usize), 8)).unwrap();
    }
    assert!(store.list(&key(0)).unwrap().len() >= 12);
}
