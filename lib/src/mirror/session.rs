//! A mirror's session: the control operations, typed. The helper decides what is legal; this only asks.

use mirrorvm_abi::{
    evidence::EVIDENCE_BYTES,
    op::{Begin, GREETING_BYTES, Greeting, Op, Start},
    record::TOKEN_BYTES,
};

use super::{Lane, LaneError, Mirror};

/// A token as it travels.
pub type SealedToken = [u8; TOKEN_BYTES];

impl Mirror {
    /// Draws a nonce and an ephemeral key for a new session, and gives what the peer's helper needs of them.
    ///
    /// # Errors
    /// [`LaneError`], as for all of these.
    pub fn hello(&mut self) -> Result<Greeting, LaneError> {
        let mut greeting = [0; GREETING_BYTES];
        self.control(Op::Hello, &[], &mut greeting).map(|()| Greeting::decode(&greeting))
    }

    /// Opens a session.
    ///
    /// # Errors
    /// [`LaneError`].
    pub fn begin(&mut self, begin: &Begin) -> Result<(), LaneError> {
        self.control(Op::Begin, &begin.encode(), &mut [])
    }

    /// Source: opens a session with evidence of the destination, as its host told it. The helper looks at it
    /// before it makes keys if the guest's owner demands any.
    ///
    /// # Errors
    /// [`LaneError`].
    pub fn begin_with(
        &mut self,
        begin: &Begin,
        evidence: Option<&[u8; EVIDENCE_BYTES]>,
    ) -> Result<(), LaneError> {
        let evidence = evidence.map_or(&[][..], |evidence| evidence);
        self.control(Op::Begin, &[&begin.encode()[..], evidence].concat(), &mut [])
    }

    /// Source: ends an epoch.
    ///
    /// # Errors
    /// [`LaneError`].
    pub fn end_epoch(&mut self) -> Result<SealedToken, LaneError> {
        self.mint(Op::EndEpoch, &[])
    }

    /// Destination: checks an epoch's token.
    ///
    /// # Errors
    /// [`LaneError`].
    pub fn check_epoch(&mut self, token: &SealedToken) -> Result<(), LaneError> {
        self.control(Op::EpochToken, token, &mut [])
    }

    /// Source: the guest is paused.
    ///
    /// # Errors
    /// [`LaneError`].
    pub fn paused(&mut self) -> Result<(), LaneError> {
        self.control(Op::Pause, &[], &mut [])
    }

    /// Source: mints START. From here the guest may not run again without ABORT.
    ///
    /// # Errors
    /// [`LaneError`].
    pub fn start(&mut self, start: &Start) -> Result<SealedToken, LaneError> {
        self.mint(Op::Start, &start.encode())
    }

    /// Destination: the digest of the state that arrived.
    ///
    /// # Errors
    /// [`LaneError`].
    pub fn state_arrived(&mut self, digest: &[u8; 32]) -> Result<(), LaneError> {
        self.control(Op::State, digest, &mut [])
    }

    /// Destination: checks START.
    ///
    /// # Errors
    /// [`LaneError`].
    pub fn check_start(&mut self, token: &SealedToken) -> Result<(), LaneError> {
        self.control(Op::StartToken, token, &mut [])
    }

    /// Destination: takes the guest over.
    ///
    /// # Errors
    /// [`LaneError`].
    pub fn commit(&mut self) -> Result<SealedToken, LaneError> {
        self.mint(Op::Commit, &[])
    }

    /// Destination: gives up for good, whatever its helper was in the midst of.
    ///
    /// # Errors
    /// [`LaneError`].
    pub fn abort(&mut self) -> Result<SealedToken, LaneError> {
        // Streams that broke off may have left groups with the helper: it mints nothing in their midst, and
        // their answers would pass for the token's.
        self.lanes().iter_mut().for_each(Lane::drain);
        self.mint(Op::Abort, &[])
    }

    /// Source: checks COMMIT.
    ///
    /// # Errors
    /// [`LaneError`].
    pub fn check_commit(&mut self, token: &SealedToken) -> Result<(), LaneError> {
        self.control(Op::CommitToken, token, &mut [])
    }

    /// Source: checks ABORT; the guest may run here again.
    ///
    /// # Errors
    /// [`LaneError`].
    pub fn check_abort(&mut self, token: &SealedToken) -> Result<(), LaneError> {
        self.control(Op::AbortToken, token, &mut [])
    }

    /// Source, before START: drops the session.
    ///
    /// # Errors
    /// [`LaneError`].
    pub fn cancel(&mut self) -> Result<(), LaneError> {
        self.control(Op::Cancel, &[], &mut [])
    }

    fn mint(&mut self, op: Op, input: &[u8]) -> Result<SealedToken, LaneError> {
        let mut token = [0; TOKEN_BYTES];
        self.control(op, input, &mut token).map(|()| token)
    }

    fn control(&mut self, op: Op, input: &[u8], output: &mut [u8]) -> Result<(), LaneError> {
        self.control_lane().control(op, input, output)
    }
}
