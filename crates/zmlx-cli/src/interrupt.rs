//! ctrl-C: stops the reply that is being written, and ends the program at any other time.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use signal_hook::consts::SIGINT;
use signal_hook::flag;

use crate::failure::Failure;

/// What a second ctrl-C does while a reply is still stopping.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum SecondPress {
    /// Ends the program at once with code 130: for commands that write one reply.
    Exits,
    /// Nothing more: for chat, where only the reply is to end.
    Ignored,
}

/// The installed handler. Install it before the model is loaded.
pub(crate) struct Interrupt {
    stop: Arc<AtomicBool>,
    /// While set, ctrl-C ends the program (through `_exit`: no destructor of the compute
    /// library runs under its working threads).
    exits: Arc<AtomicBool>,
}

impl Interrupt {
    /// Installs the handler; outside of a reply ctrl-C still ends the program with code 130.
    pub(crate) fn install(second: SecondPress) -> Result<Self, Failure> {
        let stop = Arc::new(AtomicBool::new(false));
        let exits = Arc::new(AtomicBool::new(true));
        // Handlers run in the order of registration: the exit test comes before the flags are set.
        flag::register_conditional_shutdown(SIGINT, 130, Arc::clone(&exits))
            .and_then(|_| flag::register(SIGINT, Arc::clone(&stop)))
            .and_then(|id| match second {
                SecondPress::Exits => flag::register(SIGINT, Arc::clone(&exits)),
                SecondPress::Ignored => Ok(id),
            })
            .map_err(Failure::runtime)?;
        Ok(Self { stop, exits })
    }

    /// From here until the guard is dropped, ctrl-C only asks the reply to stop.
    pub(crate) fn during_reply(&self) -> ReplyGuard<'_> {
        self.stop.store(false, Ordering::SeqCst);
        self.exits.store(false, Ordering::SeqCst);
        ReplyGuard { interrupt: self }
    }
}

/// Lives as long as one reply; see [`Interrupt::during_reply`].
pub(crate) struct ReplyGuard<'a> {
    interrupt: &'a Interrupt,
}

impl ReplyGuard<'_> {
    /// Whether ctrl-C was pressed since the reply began.
    pub(crate) fn stop_requested(&self) -> bool {
        self.interrupt.stop.load(Ordering::SeqCst)
    }
}

impl Drop for ReplyGuard<'_> {
    fn drop(&mut self) {
        self.interrupt.exits.store(true, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_press_stops_the_reply_and_the_next_reply_starts_afresh() {
        let interrupt = Interrupt::install(SecondPress::Ignored).unwrap();
        {
            let guard = interrupt.during_reply();
            assert!(!guard.stop_requested());
            signal_hook::low_level::raise(SIGINT).unwrap();
            signal_hook::low_level::raise(SIGINT).unwrap();
            assert!(guard.stop_requested());
        }
        assert!(!interrupt.during_reply().stop_requested());
    }
}
