//! Whether a migration can still be called off.
//!
//! Owns: that of calling it off and passing the point of no return one is too late. Must not know: who asks,
//! what is cancelled then.

use super::guards::{Guard, Guards};

/// Of one end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Leave {
    /// It can be called off.
    #[default]
    Open,
    /// It was.
    CalledOff,
    /// It cannot be any more: START may have gone out, or COMMIT may be minted.
    Past,
}

/// Calling it off came too late.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Past;

impl Leave {
    /// After somebody called it off.
    ///
    /// # Errors
    /// Too late; nothing has changed.
    pub const fn call_off(self) -> Result<Self, Past> {
        self.call_off_under(Guards::ALL)
    }

    pub const fn call_off_under(self, guards: Guards) -> Result<Self, Past> {
        match self {
            Self::Past if guards.hold(Guard::NoCallingOffPast) => Err(Past),
            Self::Open | Self::CalledOff | Self::Past => Ok(Self::CalledOff),
        }
    }

    /// After the point of no return was to be passed: [`Leave::Past`], or [`Leave::CalledOff`] when somebody
    /// was faster.
    pub const fn pass(self) -> Self {
        match self {
            Self::Open | Self::Past => Self::Past,
            Self::CalledOff => Self::CalledOff,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_calling_off_and_passing_the_point_of_no_return_the_second_is_too_late() {
        assert_eq!(Leave::Open.call_off(), Ok(Leave::CalledOff));
        assert_eq!(Leave::Open.call_off().map(Leave::pass), Ok(Leave::CalledOff));
        assert_eq!(Leave::Open.pass().call_off(), Err(Past));
        assert_eq!(Leave::CalledOff.call_off(), Ok(Leave::CalledOff), "once more changes nothing");
    }
}
