//! What an address is on this machine: whether one of its networks takes it for everybody, whether it has the
//! interface that is meant, whether it is the machine's own.
//!
//! Owns: the kernel's answers to these, of which nothing is sent. Must not know: what an address is
//! everywhere (`endpoint`).

use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};

use rustix::net::{AddressFamily, SocketType, netdevice, socket};

use super::endpoint::{Unconnectable, check_connectable, check_ip};

/// Whether somebody can be at `at`, as this machine sees it.
///
/// # Errors
/// Why nobody can.
pub fn check_reachable(at: &SocketAddr) -> Result<(), Unconnectable> {
    check_connectable(at)?;
    check_here(at)
}

/// Whether somebody could connect to a listener at `at`: all addresses, or one that a host may have; any
/// port.
///
/// # Errors
/// Why nobody could.
pub fn check_listenable(at: &SocketAddr) -> Result<(), Unconnectable> {
    if at.ip().is_unspecified() {
        return Ok(());
    }
    check_ip(at)?;
    check_here(at)
}

fn check_here(at: &SocketAddr) -> Result<(), Unconnectable> {
    if let SocketAddr::V6(v6) = at
        && v6.scope_id() != 0
        && !has_interface(v6.scope_id())
    {
        return Err(Unconnectable::NoInterface);
    }
    match at.ip().to_canonical() {
        IpAddr::V4(v4) if is_broadcast(v4) => Err(Unconnectable::Broadcast),
        IpAddr::V4(_) | IpAddr::V6(_) => Ok(()),
    }
}

/// Whether the kernel sends to everybody what is sent to `ip`: it lets a datagram socket have such an address
/// only when the socket says that it means it. Connecting one only looks into the tables of routes.
fn is_broadcast(ip: Ipv4Addr) -> bool {
    // Port 9 is as good as any other.
    let connects = |broadcast: bool| -> std::io::Result<()> {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        socket.set_broadcast(broadcast)?;
        socket.connect((ip, 9))
    };
    // Both fail alike where a route prohibits it.
    connects(false).is_err_and(|e| e.kind() == std::io::ErrorKind::PermissionDenied) && connects(true).is_ok()
}

/// Whether there is an interface of this number. Where the kernel cannot be asked there may be one.
fn has_interface(number: u32) -> bool {
    match socket(AddressFamily::INET, SocketType::DGRAM, None) {
        Ok(asking) => netdevice::index_to_name(&asking, number).is_ok(),
        Err(_) => true,
    }
}

/// Whether an address is one of this machine: it can be bound to, and only there.
pub fn is_own(ip: IpAddr) -> bool {
    UdpSocket::bind((ip, 0)).is_ok()
}

/// Whether whoever connects to `at` comes to a listener of this machine at `bound`.
pub fn is_at(bound: SocketAddr, at: SocketAddr) -> bool {
    let (own, ip) = (bound.ip().to_canonical(), at.ip().to_canonical());
    let any = || own.is_unspecified() && (own.is_ipv6() || ip.is_ipv4()) && is_own(ip);
    at.port() == bound.port() && (own == ip || any())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    #[test]
    fn what_every_machine_takes_for_everybody_or_nobody_is_known() {
        assert!(is_broadcast(Ipv4Addr::new(127, 255, 255, 255)));
        for ip in [Ipv4Addr::LOCALHOST, Ipv4Addr::new(127, 9, 9, 9)] {
            assert!(!is_broadcast(ip) && is_own(ip.into()), "{ip}");
        }
        assert_eq!(check_reachable(&at("127.0.0.1:1")), Ok(()));
        assert_eq!(check_reachable(&at("[fe80::1%4294967295]:1")), Err(Unconnectable::NoInterface));
        assert_eq!(check_reachable(&at("[2001:db8::1%4294967295]:1")), Err(Unconnectable::NoInterface));
        // The loopback interface is the first everywhere.
        assert_eq!(check_reachable(&at("[fe80::1%1]:1")), Ok(()));
        assert_eq!(check_reachable(&at("240.0.0.1:1")), Err(Unconnectable::Reserved));
    }

    #[test]
    fn a_listener_is_on_all_addresses_or_on_one_that_a_host_may_have() {
        for text in ["0.0.0.0:0", "[::]:0", "127.0.0.1:0", "[::1]:7801", "192.0.2.7:0"] {
            assert_eq!(check_listenable(&at(text)), Ok(()), "{text}");
        }
        for text in [
            "224.0.0.1:0",
            "255.255.255.255:0",
            "127.255.255.255:0",
            "127.0.0.0:0",
            "240.0.0.1:0",
            "0.1.2.3:0",
            "[ff02::1]:0",
            "[fe80::1]:0",
            "[fe80::1%4294967295]:0",
        ] {
            assert!(check_listenable(&at(text)).is_err(), "{text}");
        }
    }

    #[test]
    fn a_listener_on_all_addresses_is_met_at_each_of_the_machines() {
        for (bound, met, is) in [
            ("127.0.0.1:5", "127.0.0.1:5", true),
            ("127.0.0.1:5", "[::ffff:127.0.0.1]:5", true),
            ("127.0.0.1:5", "127.0.0.1:6", false),
            ("127.0.0.1:5", "127.0.0.2:5", false),
            ("0.0.0.0:5", "127.0.0.2:5", true),
            ("[::]:5", "127.0.0.2:5", true),
            ("0.0.0.0:5", "[::1]:5", false),
        ] {
            assert_eq!(is_at(at(bound), at(met)), is, "{bound} {met}");
        }
    }
}
