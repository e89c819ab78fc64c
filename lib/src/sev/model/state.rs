//! A guest's life in the firmware, as a pure function.
//!
//! Source: SEV API specification (55766), the table of guest states and the commands allowed in each, as
//! sev-tool's sevapi.h lists them; SENT and SEND_CANCEL are of later versions of the API. That DBG_DECRYPT
//! and DBG_ENCRYPT work in RUNNING and SUPDATE alone is this model's reading: the table does not list them.
//! ATTESTATION's states (LSECRET, RUNNING, SUPDATE, SENT) are those that Xen asks it in (asp.c).

use crate::sev::{FirmwareError, GuestState};

/// Where a guest is in its life (GSTATE). The numbers are the firmware's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum State {
    /// There is no guest yet.
    Uninit = 0,
    /// Pages are added and measured.
    LaunchUpdate = 1,
    /// Measured; secrets may be injected.
    LaunchSecret = 2,
    /// The guest was launched or received.
    Running = 3,
    /// Pages leave for another platform.
    SendUpdate = 4,
    /// Pages arrive from another platform.
    ReceiveUpdate = 5,
    /// Sent: it runs elsewhere now.
    Sent = 6,
}

impl State {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Uninit,
        Self::LaunchUpdate,
        Self::LaunchSecret,
        Self::Running,
        Self::SendUpdate,
        Self::ReceiveUpdate,
        Self::Sent,
    ];

    /// As GUEST_STATUS tells it.
    pub const fn shown(self) -> GuestState {
        match self {
            Self::Uninit => GuestState::Invalid,
            Self::LaunchUpdate => GuestState::Launching,
            Self::LaunchSecret => GuestState::Secret,
            Self::Running => GuestState::Running,
            Self::SendUpdate => GuestState::Sending,
            Self::ReceiveUpdate => GuestState::Receiving,
            Self::Sent => GuestState::Sent,
        }
    }
}

/// The commands that concern one guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "the names are the specification's")]
pub enum Command {
    LaunchStart,
    LaunchUpdateData,
    LaunchUpdateVmsa,
    LaunchMeasure,
    LaunchSecret,
    LaunchFinish,
    SendStart,
    SendUpdateData,
    SendUpdateVmsa,
    SendFinish,
    SendCancel,
    ReceiveStart,
    ReceiveUpdateData,
    ReceiveUpdateVmsa,
    ReceiveFinish,
    Activate,
    Deactivate,
    Decommission,
    GuestStatus,
    DbgDecrypt,
    DbgEncrypt,
    Attestation,
}

impl Command {
    /// All of them.
    pub const ALL: [Self; 22] = [
        Self::LaunchStart,
        Self::LaunchUpdateData,
        Self::LaunchUpdateVmsa,
        Self::LaunchMeasure,
        Self::LaunchSecret,
        Self::LaunchFinish,
        Self::SendStart,
        Self::SendUpdateData,
        Self::SendUpdateVmsa,
        Self::SendFinish,
        Self::SendCancel,
        Self::ReceiveStart,
        Self::ReceiveUpdateData,
        Self::ReceiveUpdateVmsa,
        Self::ReceiveFinish,
        Self::Activate,
        Self::Deactivate,
        Self::Decommission,
        Self::GuestStatus,
        Self::DbgDecrypt,
        Self::DbgEncrypt,
        Self::Attestation,
    ];
}

/// Where `command` leads from `state`.
///
/// # Errors
/// INVALID_GUEST_STATE: nowhere.
pub const fn step(state: State, command: Command) -> Result<State, FirmwareError> {
    use {Command as C, State as S};
    match (state, command) {
        (S::Uninit, C::LaunchStart) => Ok(S::LaunchUpdate),
        (S::Uninit, C::ReceiveStart) => Ok(S::ReceiveUpdate),
        (S::LaunchUpdate, C::LaunchUpdateData | C::LaunchUpdateVmsa)
        | (S::LaunchSecret, C::LaunchSecret)
        | (S::Running, C::DbgDecrypt | C::DbgEncrypt)
        | (S::SendUpdate, C::SendUpdateData | C::SendUpdateVmsa | C::DbgDecrypt | C::DbgEncrypt)
        | (S::ReceiveUpdate, C::ReceiveUpdateData | C::ReceiveUpdateVmsa) => Ok(state),
        (S::LaunchUpdate, C::LaunchMeasure) => Ok(S::LaunchSecret),
        (S::LaunchSecret, C::LaunchFinish)
        | (S::SendUpdate, C::SendCancel)
        | (S::ReceiveUpdate, C::ReceiveFinish) => Ok(S::Running),
        (S::LaunchSecret | S::Running | S::SendUpdate | S::Sent, C::Attestation) => Ok(state),
        (S::Running, C::SendStart) => Ok(S::SendUpdate),
        (S::SendUpdate, C::SendFinish) => Ok(S::Sent),
        (
            S::LaunchUpdate | S::LaunchSecret | S::Running | S::SendUpdate | S::ReceiveUpdate | S::Sent,
            C::Activate | C::Deactivate | C::GuestStatus,
        ) => Ok(state),
        (
            S::LaunchUpdate | S::LaunchSecret | S::Running | S::SendUpdate | S::ReceiveUpdate | S::Sent,
            C::Decommission,
        ) => Ok(S::Uninit),
        _ => Err(FirmwareError::InvalidGuestState),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The specification's table, written out by hand: a row for each state, in it the commands in their
    /// order (LAUNCH_*, SEND_*, RECEIVE_*, the rest); a digit is the state that it leads to, `-` a refusal.
    const TABLE: [[&str; 4]; 7] = [
        ["1-----", "-----", "5---", "-------"],
        ["-112--", "-----", "----", "1101---"],
        ["----23", "-----", "----", "2202--2"],
        ["------", "4----", "----", "3303333"],
        ["------", "-4463", "----", "4404444"],
        ["------", "-----", "-553", "5505---"],
        ["------", "-----", "----", "6606--6"],
    ];

    #[test]
    fn the_whole_table() {
        for (number, (state, row)) in State::ALL.into_iter().zip(TABLE).enumerate() {
            assert_eq!(state as usize, number);
            let row = row.concat();
            assert_eq!(row.len(), Command::ALL.len());
            for (command, cell) in Command::ALL.into_iter().zip(row.chars()) {
                let expected =
                    cell.to_digit(10).map(|d| State::ALL[d as usize]).ok_or(FirmwareError::InvalidGuestState);
                assert_eq!(step(state, command), expected, "{state:?}, {command:?}");
            }
        }
    }

    proptest! {
        /// Whatever is asked for: pages are measured before a guest runs, and what was sent never runs again.
        #[test]
        fn no_sequence_breaks_the_order(commands in prop::collection::vec(prop::sample::select(&Command::ALL[..]), 0..60)) {
            let (mut state, mut measured, mut received, mut sent) = (State::Uninit, false, false, false);
            for command in commands {
                let Ok(next) = step(state, command) else { continue };
                match command {
                    Command::LaunchStart | Command::ReceiveStart => (measured, received, sent) = (false, false, false),
                    Command::LaunchMeasure => measured = true,
                    Command::ReceiveFinish => received = true,
                    Command::SendFinish => sent = true,
                    Command::LaunchUpdateData | Command::LaunchUpdateVmsa => prop_assert!(!measured),
                    _ => {}
                }
                if next == State::Running {
                    prop_assert!((measured || received) && !sent);
                }
                state = next;
            }
        }
    }
}
