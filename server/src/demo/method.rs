//! A strategy with its parameters, as the demo asks for it.

use clap::ValueEnum;
use mirrorvm::address_space::StrategyKind;
use serde_json::{Value, json};

use super::args::ShiftChoice;

/// One strategy with its parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Method {
    Shifted(ShiftChoice),
    IdentityCbit,
    Declared,
    PspCopied(Via),
}

/// How a `psp-copied` helper gets into its memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Via {
    /// Loaded and measured like firmware, for the mirror alone.
    LaunchUpdate,
    /// By the firmware's SEND and RECEIVE into a context that shares the key.
    SendReceive,
}

impl Via {
    const fn name(self) -> &'static str {
        match self {
            Self::LaunchUpdate => "launch-update",
            Self::SendReceive => "send-receive",
        }
    }
}

impl Method {
    /// Every way of a kind of strategy, with the shift that was asked for.
    pub(super) fn all_of(kind: StrategyKind, shift: ShiftChoice) -> Vec<Self> {
        match kind {
            StrategyKind::Shifted => vec![Self::Shifted(shift)],
            StrategyKind::IdentityCbit => vec![Self::IdentityCbit],
            StrategyKind::Declared => vec![Self::Declared],
            StrategyKind::PspCopied => {
                vec![Self::PspCopied(Via::LaunchUpdate), Self::PspCopied(Via::SendReceive)]
            }
        }
    }

    /// The strategy's kind, as the API spells it.
    pub(super) const fn kind(self) -> &'static str {
        let kind = match self {
            Self::Shifted(_) => StrategyKind::Shifted,
            Self::IdentityCbit => StrategyKind::IdentityCbit,
            Self::Declared => StrategyKind::Declared,
            Self::PspCopied(_) => StrategyKind::PspCopied,
        };
        kind.name()
    }

    /// The way, where there are several.
    pub(super) const fn via(self) -> Option<&'static str> {
        match self {
            Self::PspCopied(via) => Some(via.name()),
            Self::Shifted(_) | Self::IdentityCbit | Self::Declared => None,
        }
    }

    /// Kind and way, for people.
    pub(super) fn title(self) -> String {
        self.via().map_or_else(|| self.kind().to_owned(), |via| format!("{} {via}", self.kind()))
    }

    /// Name of the guest that is moved by it.
    pub(super) fn guest(self) -> String {
        format!("demo-{}", self.title().replace(' ', "-"))
    }

    /// As the API has it.
    pub(super) fn body(self) -> Value {
        let kind = self.kind();
        match self {
            Self::Shifted(shift) => {
                let shift = match shift {
                    ShiftChoice::FourGib => json!({"kind": "4gib"}),
                    ShiftChoice::MaxPhys => json!({"kind": "max-phys"}),
                    ShiftChoice::Bytes(bytes) => json!({"kind": "explicit", "bytes": bytes}),
                };
                json!({"kind": kind, "shift": shift})
            }
            Self::IdentityCbit | Self::Declared => json!({"kind": kind}),
            Self::PspCopied(via) => json!({"kind": kind, "via": via.name()}),
        }
    }
}
