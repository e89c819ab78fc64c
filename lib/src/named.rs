//! Closed lists of values that have names in the API, in stored records and between hosts.
//!
//! Owns: the one form in which such a list is stated, so that values, all of them, and their names cannot
//! come apart. Must not know: any list.

/// Makes an enum of the values, with `ALL`, `NAMES`, `name` and `named`.
macro_rules! named {
    ($(#[$meta:meta])* $vis:vis enum $list:ident { $($(#[$doc:meta])* $value:ident = $name:literal,)+ }) => {
        $(#[$meta])*
        $vis enum $list {
            $($(#[$doc])* $value,)+
        }

        impl $list {
            /// All there are, in the order in which they are shown.
            pub const ALL: &'static [Self] = &[$(Self::$value),+];

            /// The names of all, in the same order.
            pub const NAMES: &'static [&'static str] = &[$($name),+];

            /// Its name in the API, in stored records and between hosts.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$value => $name,)+
                }
            }

            /// The one of this name.
            pub fn named(name: &str) -> Option<Self> {
                Self::ALL.iter().copied().find(|value| value.name() == name)
            }
        }
    };
}

pub(crate) use named;

#[cfg(test)]
mod tests {
    named! {
        /// Of the test.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        enum Colour {
            /// Like the sky.
            Blue = "blue",
            /// Like rust.
            DarkRed = "dark-red",
        }
    }

    #[test]
    fn values_and_names_are_one_list() {
        assert_eq!(Colour::NAMES, ["blue", "dark-red"]);
        for colour in Colour::ALL {
            assert_eq!(Colour::named(colour.name()), Some(*colour));
        }
        assert_eq!((Colour::DarkRed.name(), Colour::named("Blue")), ("dark-red", None));
    }
}
